"""A reward for pictures as the judge of clips: it looks at every frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.rewards.base import Request, Reward, RewardOutput

Pool = Literal["mean", "min"]


class FrameReward(Reward):
    """What a reward says of the frames of a clip, as one number.

    Whether the frames follow each other it cannot see: a still picture repeated may have the
    highest value.

    Args:
        reward: judges pictures.
        pool: ``mean`` over the frames, or the worst one's, ``min``.

    Raises:
        ConfigError: an unknown pool, or a reward that judges clips by itself.
    """

    clips = True

    def __init__(self, reward: Reward, pool: Pool = "mean") -> None:
        if pool not in get_args(Pool):
            raise ConfigError(
                f"reward_frames={pool} is unknown. Choose one of {', '.join(get_args(Pool))}."
                f"{did_you_mean(str(pool), get_args(Pool))}"
            )
        if reward.clips:
            raise ConfigError(
                f"reward {reward.label} judges clips by itself, and no frames. Use it as it is."
            )
        self.reward = reward
        self.pool = pool
        self.needs = reward.needs
        self.differentiable = reward.differentiable
        self.potential = reward.potential
        self.licence = reward.licence

    @property
    def label(self) -> str:
        """The reward, and what is made of the frames."""
        return f"{self.reward.label}, {self.pool} over frames"

    def check(self) -> list[str]:
        """Return what the reward lacks; one that learns from pictures has none to learn from."""
        if self.reward.learns:
            return [
                f"reward {self.reward.label} learns from the pictures that a run was trained on, "
                "but these are clips. Choose another reward=..."
            ]
        return self.reward.check()

    def problems(self, requests: Sequence[Request]) -> list[str]:
        """Return what the requests lack for the reward."""
        return self.reward.problems(requests)

    def prepare(self, requests: Sequence[Request]) -> Any:
        """Return the reward's own handle."""
        return self.reward.prepare(requests)

    def score(self, images: Tensor, handle: Any, index: Tensor) -> RewardOutput:
        """Judge clips ``(B, C, T, H, W)`` in [0, 1], one frame of all of them at a time."""
        each = [self.reward.score(frame, handle, index) for frame in images.unbind(2)]
        valid = [output.valid for output in each if output.valid is not None]
        return RewardOutput(
            self._pooled([output.value for output in each]),
            {
                # nothing is left to ask for where that holds of every frame
                name: (_least if name == "met" else self._pooled)(
                    [output.parts[name] for output in each]
                )
                for name in each[0].parts
            },
            torch.stack(valid).all(0) if valid else None,
        )

    def loss(self, images: Tensor, handle: Any, index: Tensor) -> Tensor:
        """Return the mean of the frames' losses ``(B,)``, or the highest, with gradients."""
        each = [self.reward.loss(frame, handle, index) for frame in images.unbind(2)]
        stacked = torch.stack(each)
        return stacked.mean(0) if self.pool == "mean" else stacked.amax(0)

    def compare(self, output: RewardOutput, group: Tensor) -> Tensor:
        """Order candidates as the reward does."""
        return self.reward.compare(output, group)

    def to(self, device: torch.device | str) -> Self:
        """Move the reward's network."""
        self.reward.to(device)
        return self

    @property
    def _pooled(self) -> Callable[[Sequence[Tensor]], Tensor]:
        return _least if self.pool == "min" else _mean


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _least(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).amin(0)
