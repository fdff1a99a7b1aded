"""Does a picture show the scene its caption asks for? Read off the pixels, without a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.data.scenes.grammar import Requirement, parse_caption
from genscale.data.scenes.oracle import CaptionAgreement, agreement_of, read_scene
from genscale.errors import ConfigError, did_you_mean
from genscale.io.images import to_uint8
from genscale.rewards.base import Request, Reward, RewardOutput

Measure = Literal[
    "all", "mean", "count_exact", "count_soft", "count_neg_sq", "colour", "shape", "relation"
]
MEASURES_OF_SCENES: tuple[Measure, ...] = get_args(Measure)


class SceneOracle(Reward):
    """The oracle of scenes as a reward: it cannot be fooled, only satisfied.

    With c objects found and n asked for:

    - ``all``: 1 if everything is as the caption says, else 0.
    - ``mean``: mean of the results that apply to the caption (count, colour, shape, relation):
      a graded reward that a search can climb.
    - ``count_exact``: 1 if c = n, else 0; ``count_soft``: exp(-abs(c - n)); ``count_neg_sq``:
      -(c - n)^2.
    - ``colour``: share of the objects found with their colour and shape, one to one; ``shape``:
      with their shape.
    - ``relation``: 1 if the two objects lie as the caption says, else 0.

    Parts are the results of every task (nan where the caption asks for no such thing) and
    ``objects``, the number found.

    Args:
        measure: what the value is.

    Raises:
        ConfigError: an unknown measure.
    """

    needs = frozenset({"caption"})

    def __init__(self, *, measure: Measure = "mean") -> None:
        if measure not in MEASURES_OF_SCENES:
            raise ConfigError(
                f"reward.measure='{measure}' is no measure of scenes. Choose one of "
                f"{', '.join(MEASURES_OF_SCENES)}.{did_you_mean(measure, MEASURES_OF_SCENES)}"
            )
        self.measure = measure

    @property
    def label(self) -> str:
        """Name and measure."""
        return f"SceneOracle({self.measure})"

    def problems(self, requests: Sequence[Request]) -> list[str]:
        """Return a sentence for the first caption that cannot be judged."""
        return super().problems(requests) or scene_problems(
            self.label, requests, self.measure if self.measure in ("colour", "relation") else None
        )

    def prepare(self, requests: Sequence[Request]) -> tuple[Requirement, ...]:
        """Return what each caption asks for."""
        return requirements(requests)

    def score(self, images: Tensor, handle: tuple[Requirement, ...], index: Tensor) -> RewardOutput:
        """Judge pictures ``(B, 3, H, W)``, rounded to 8 bits.

        Raises:
            DataError: pictures that are no RGB.
        """
        pixels = to_uint8(2.0 * images.detach() - 1.0).cpu()
        values: list[float] = []
        parts: dict[str, list[float]] = {}
        for image, request in zip(pixels, index.tolist(), strict=True):
            asked = handle[request]
            objects = read_scene(image.numpy()).objects
            results = agreement_of(objects, asked)
            values.append(self._value(results, len(objects), asked.count))
            for name, part in (*results.results().items(), ("objects", float(len(objects)))):
                parts.setdefault(name, []).append(math.nan if part is None else part)
        value = images.new_tensor(values, dtype=torch.float32)
        return RewardOutput(
            value,
            {name: images.new_tensor(part, dtype=torch.float32) for name, part in parts.items()},
            ~value.isnan(),
        )

    def _value(self, results: CaptionAgreement, found: int, asked: int) -> float:
        if self.measure == "mean":
            tasks = (results.count, results.colour, results.shape, results.relation)
            applicable = [each for each in tasks if each is not None]
            return sum(applicable) / len(applicable)
        if self.measure == "count_soft":
            return math.exp(-abs(found - asked))
        if self.measure == "count_neg_sq":
            return -float((found - asked) ** 2)
        task = "count" if self.measure == "count_exact" else self.measure
        part = results.results()[task]
        return math.nan if part is None else part


def requirements(requests: Sequence[Request]) -> tuple[Requirement, ...]:
    """Return what the captions of requests ask for.

    Raises:
        ConfigError: a caption that does not follow the grammar of scenes.
    """
    return tuple(parse_caption(request.caption or "") for request in requests)


def scene_problems(
    reward: str, requests: Sequence[Request], task: Literal["colour", "relation"] | None = None
) -> list[str]:
    """Return a sentence for the first caption that a reward of scenes cannot judge.

    Args:
        reward: its label.
        requests: all with captions.
        task: what every caption must ask for, if anything.
    """
    for request in requests:
        try:
            asked = parse_caption(request.caption or "")
        except ConfigError as error:
            return [f"reward {reward} judges pictures of scenes only: {error}"]
        applies = {
            "colour": all(colour is not None for colour, _ in asked.objects),
            "relation": asked.relation is not None,
        }
        if task is not None and not applies[task]:
            return [
                f"reward {reward} judges by the {task} that a caption names, but "
                f"'{request.caption}' names none. Choose measure=mean, which takes what applies."
            ]
    return []
