"""Several rewards as one: weighted sums, and ensembles that rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.rewards.base import Request, Reward, RewardOutput

if TYPE_CHECKING:
    from genscale.data.module import ImageDataModule

Normalise = Literal["none", "affine", "zscore_group", "rank", "minmax_running"]
_OF_A_PICTURE = ("none", "affine")


class Composite(Reward):
    """A weighted sum of rewards, each brought to a common scale first.

    - ``none``: values as they are.
    - ``affine``: (value - shift) / scale with fixed numbers: a potential for particle methods.
    - ``zscore_group``: within the candidates of a request, less the mean, over the deviation.
    - ``rank``: an ensemble of verifiers (arXiv:2501.09732): the mean of the ranks among the
      candidates of a request, each reward's own; equal values share their mean rank. No scale
      matters, so it is the choice for best-of-N. Ranks run from 0 (worst) to 1.
    - ``minmax_running``: from 0 to 1 over all that a request's candidates reached so far.

    The last three compare candidates with each other, so they exist in :meth:`compare` alone; the
    value of a picture by itself is then the plain weighted sum.

    Args:
        rewards: by the name of their parts.
        weights: by name; those not named weigh 1.
        normalise: one of those above.
        shift: by name, of ``affine``; 0 for those not named.
        scale: by name, of ``affine``; 1 for those not named.
        clip: lowest and highest contribution of a reward before its weight, after ``affine``;
            None for no bounds. Gradients are those of the rewards without bounds.

    Raises:
        ConfigError: no rewards, unknown names, a scale that is not positive, or bounds in the
            wrong order.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        *,
        weights: Mapping[str, float] | None = None,
        normalise: Normalise = "none",
        shift: Mapping[str, float] | None = None,
        scale: Mapping[str, float] | None = None,
        clip: Sequence[float] | None = None,
    ) -> None:
        if not rewards:
            raise ConfigError(
                "reward.rewards is empty, but a composite needs one reward or more. Give "
                "reward.rewards.<name>=..., or another reward=..."
            )
        if normalise not in get_args(Normalise):
            raise ConfigError(
                f"reward.normalise='{normalise}' is unknown. Choose one of "
                f"{', '.join(get_args(Normalise))}.{did_you_mean(normalise, get_args(Normalise))}"
            )
        self.rewards = dict(rewards)
        self.normalise = normalise
        self.weights = self._each("weights", weights, 1.0)
        self.shift = self._each("shift", shift, 0.0)
        self.scale = self._each("scale", scale, 1.0)
        if (shift or scale) and normalise != "affine":
            raise ConfigError(
                f"reward.shift and reward.scale are numbers of normalise=affine, but "
                f"reward.normalise={normalise}. Set it to affine, or leave them out."
            )
        if min(self.scale.values()) <= 0.0:
            raise ConfigError(
                f"reward.scale={self.scale} must be positive. Turn a reward round by its weight."
            )
        if clip is not None and (len(clip) != 2 or clip[0] >= clip[1]):
            raise ConfigError(
                f"reward.clip={list(clip)} is no pair of bounds, lowest first. Give [-3, 3], say."
            )
        self.clip = None if clip is None else (float(clip[0]), float(clip[1]))
        every = list(self.rewards.values())
        alone = normalise in _OF_A_PICTURE
        self.needs = frozenset(need for each in every for need in each.needs)
        self.differentiable = alone and all(each.differentiable for each in every)
        self.potential = alone and all(each.potential for each in every)
        self.learns = any(each.learns for each in every)
        self.clips = any(each.clips for each in every)
        self.licence = "; ".join(dict.fromkeys(each.licence for each in every if each.licence))
        self._range: dict[str, Range] = {}

    def _each(
        self, what: str, given: Mapping[str, float] | None, default: float
    ) -> dict[str, float]:
        for name in given or {}:
            if name not in self.rewards:
                known = tuple(self.rewards)
                raise ConfigError(
                    f"reward.{what} names '{name}', which is none of the composite's rewards "
                    f"({', '.join(known)}).{did_you_mean(name, known)}"
                )
        return {name: float((given or {}).get(name, default)) for name in self.rewards}

    @property
    def label(self) -> str:
        """Weights, names, and how they are brought to one scale."""
        terms = []
        for name, each in self.rewards.items():
            moved = ""
            if self.normalise == "affine":
                moved = f" - {self.shift[name]:g} over {self.scale[name]:g}"
            terms.append(f"{self.weights[name]:g} {each.label}{moved}")
        bounds = "" if self.clip is None else f", {self.clip[0]:g} to {self.clip[1]:g}"
        return f"Composite({' + '.join(terms)}, {self.normalise}{bounds})"

    def check(self) -> list[str]:
        """Return what the rewards lack; none of pictures judges beside one of clips."""
        mixed = [each for each in self.rewards.values() if each.clips != self.clips]
        return [
            *(each for reward in self.rewards.values() for each in reward.check()),
            *(
                f"reward {each.label} judges pictures, but others of the composite judge clips. "
                "Put it into genscale.rewards.frames.FrameReward, or leave it out."
                for each in mixed
            ),
        ]

    def problems(self, requests: Sequence[Request]) -> list[str]:
        """Return what the requests lack for each reward."""
        return [each for reward in self.rewards.values() for each in reward.problems(requests)]

    def fit(self, datamodule: ImageDataModule) -> None:
        """Let those learn that do."""
        for reward in self.rewards.values():
            if reward.learns:
                reward.fit(datamodule)

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the handles of the rewards; running ranges begin anew."""
        self._range = {name: Range(len(requests)) for name in self.rewards}
        return {name: reward.prepare(requests) for name, reward in self.rewards.items()}

    def score(self, images: Tensor, handle: dict[str, Any], index: Tensor) -> RewardOutput:
        """Judge pictures by every reward; see the class.

        Parts are ``<name>``, the value of each, and ``<name>.<part>``.
        """
        value = images.new_zeros(len(images), dtype=torch.float32)
        valid = torch.ones(len(images), dtype=torch.bool, device=images.device)
        parts: dict[str, Tensor] = {}
        for name, reward in self.rewards.items():
            output = reward.score(images, handle[name], index)
            if output.valid is not None:
                valid &= output.valid.to(valid.device)
            self._range[name].add(output.value, index)
            own = self._affine(name, output.value.float())
            if self.clip is not None and self.normalise in _OF_A_PICTURE:
                own = own.clamp(*self.clip)
            value = value + self.weights[name] * own
            parts[name] = output.value
            parts |= {f"{name}.{part}": each for part, each in output.parts.items()}
        return RewardOutput(value, parts, valid)

    def loss(self, images: Tensor, handle: dict[str, Any], index: Tensor) -> Tensor:
        """Return the weighted sum of the losses, over their scales, ``(B,)``.

        Raises:
            NotImplementedError: a reward has no gradient, or candidates are compared.
        """
        if not self.differentiable:
            raise NotImplementedError(f"Reward {self.label} has no gradient.")
        total = images.new_zeros(len(images))
        for name, reward in self.rewards.items():
            own = reward.loss(images, handle[name], index)
            total = total + self.weights[name] / self.scale[name] * own
        return total

    def compare(self, output: RewardOutput, group: Tensor) -> Tensor:
        """Order candidates; see :meth:`genscale.rewards.base.Reward.compare`.

        Candidates of which some value is not finite come last and count for no statistics.
        """
        if self.normalise in _OF_A_PICTURE:
            return output.value
        total = torch.zeros(len(group), dtype=torch.float64)
        good = output.value.isfinite().cpu()
        own = {name: self._ordered(name, output, group) for name in self.rewards}
        for values in own.values():
            good &= values.isfinite()
        for name, values in own.items():
            scaled = torch.zeros_like(total)
            if self.normalise == "minmax_running":
                raw = output.parts[name].double().cpu()
                scaled[good] = self._range[name].place(raw[good], group[good])
            else:
                of = zscores if self.normalise == "zscore_group" else mean_ranks
                scaled[good] = of(values[good], group[good])
            if self.clip is not None:
                scaled = scaled.clamp(*self.clip)
            total += self.weights[name] * scaled
        if self.normalise == "rank":
            total /= sum(abs(weight) for weight in self.weights.values()) or 1.0
        return total.where(good, -torch.inf)

    def _ordered(self, name: str, output: RewardOutput, group: Tensor) -> Tensor:
        """Return what a reward itself orders the candidates by, float64 on the CPU."""
        start = f"{name}."
        parts = {
            part[len(start) :]: each
            for part, each in output.parts.items()
            if part.startswith(start)
        }
        own = self.rewards[name].compare(RewardOutput(output.parts[name], parts), group)
        return own.detach().double().cpu()

    def _affine(self, name: str, value: Tensor) -> Tensor:
        if self.normalise != "affine":
            return value
        return (value - self.shift[name]) / self.scale[name]

    def to(self, device: torch.device | str) -> Self:
        """Move all rewards."""
        for reward in self.rewards.values():
            reward.to(device)
        return self


class Range:
    """The lowest and highest finite values of each request so far.

    Args:
        requests: how many there are.
    """

    def __init__(self, requests: int) -> None:
        self.low = torch.full((requests,), torch.inf, dtype=torch.float64)
        self.high = torch.full((requests,), -torch.inf, dtype=torch.float64)

    def add(self, values: Tensor, index: Tensor) -> None:
        """Take values ``(n,)`` of requests ``index`` into account."""
        own = values.detach().double().cpu()
        good = own.isfinite()
        own, rows = own[good], index.cpu()[good]
        self.low.scatter_reduce_(0, rows, own, "amin")
        self.high.scatter_reduce_(0, rows, own, "amax")

    def place(self, values: Tensor, index: Tensor) -> Tensor:
        """Return where values lie, 0 to 1; 1/2 where all were equal so far."""
        low, width = self.low[index], (self.high - self.low)[index]
        return torch.where(width > 0, (values - low) / width.clamp(min=1e-300), 0.5)


def _rows_of_groups(group: Tensor) -> Iterable[Tensor]:
    return ((group == each).nonzero().flatten() for each in torch.unique(group))


def zscores(values: Tensor, group: Tensor) -> Tensor:
    """Return values less the mean of their group, over its deviation; 0 where all are equal."""
    result = torch.zeros_like(values)
    for rows in _rows_of_groups(group):
        own = values[rows] - values[rows].mean()
        deviation = own.square().mean().sqrt()
        if deviation > 0:
            result[rows] = own / deviation
    return result


def mean_ranks(values: Tensor, group: Tensor) -> Tensor:
    """Return ranks within each group from 0 (lowest) to 1; equal values share their mean rank."""
    result = torch.full_like(values, 0.5)
    for rows in _rows_of_groups(group):
        own = values[rows]
        if len(rows) > 1:
            below = (own[None] < own[:, None]).sum(1)
            equal = (own[None] == own[:, None]).sum(1)
            result[rows] = (below + (equal - 1).to(own) / 2) / (len(rows) - 1)
    return result
