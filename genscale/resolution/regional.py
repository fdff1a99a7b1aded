"""Windows that know the whole: held structure, and prompts of their own (arXiv:2505.16976)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import Level
from genscale.resolution.base import ModelCall, ResolutionOp, Sides
from genscale.resolution.flow_guided import align
from genscale.resolution.frequency import butterworth, low_pass
from genscale.resolution.windows import Box, WindowConditions, WindowFusion


class StructurePrior(ResolutionOp):
    """Hold the low frequencies of a guide: fewer of them and more loosely from step to step.

    x_0 + w_i LP_i(z - x_0), with weight and cut-off both falling evenly to 0 over the run.

    Args:
        guide: z ``(B, C, H, W)``.
        steps: n of the run.
        weight: w at the first step.
        ratio: of the Butterworth filter at the first step.
    """

    def __init__(
        self, guide: Tensor, steps: int, *, weight: float = 1.0, ratio: float = 0.3
    ) -> None:
        self.guide, self.steps, self.weight, self.ratio = guide, steps, weight, ratio

    def post_x0(self, x0: Tensor, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Move the estimate."""
        if i >= self.steps:
            return x0
        share = 1.0 - i / self.steps
        height, width = x0.shape[-2:]
        mask = butterworth(height, width, self.ratio * share, centred=True, device=x0.device)
        return align(x0, self.guide, self.weight * share, lambda picture: low_pass(picture, mask))


class DescribedWindows:
    """Conditions of windows from captions of what an enlarged picture shows there.

    Args:
        pictures: ``(B, C, H', W')`` in [-1, 1], the enlarged result.
        sides: height and width of latents that windows are cut from.
        describe: from B cut pictures to B captions.
        encode: from captions to conditions.
    """

    def __init__(
        self,
        pictures: Tensor,
        sides: Sides,
        describe: Callable[[Tensor], Sequence[str]],
        encode: Callable[[Sequence[str]], Conditioning],
    ) -> None:
        self.pictures, self.describe, self.encode = pictures, describe, encode
        self.factor = pictures.shape[-2] // sides[0], pictures.shape[-1] // sides[1]
        self._known: dict[Box, Conditioning] = {}

    def __call__(self, cond: Conditioning, boxes: list[Box]) -> Conditioning:
        """Return the conditions of all windows; each window is described once.

        Raises:
            ConfigError: not one caption a picture.
        """
        for box in boxes:
            if box not in self._known:
                self._known[box] = self._described(box)
        windows = Conditioning.cat([self._known[box] for box in boxes])
        source = next((v for v in (cond.text, cond.labels) if v is not None), None)
        return windows if source is None else windows.to(source.device)

    def _described(self, box: Box) -> Conditioning:
        top, bottom, left, right = (
            max(place, 0) * self.factor[axis // 2] for axis, place in enumerate(box)
        )
        captions = list(self.describe(self.pictures[..., top:bottom, left:right]))
        if len(captions) != len(self.pictures):
            raise ConfigError(
                f"describe must return a caption for each of {len(self.pictures)} pictures, but "
                f"returned {len(captions)}. Return one each."
            )
        return self.encode(captions)


class RegionalWindows(ResolutionOp):
    """Call a view by windows, under the screened prompt of the whole and under descriptions.

    (1 - w) of the one estimate and w of the other; without descriptions the first alone.

    Args:
        screened: conditions of windows from those of the whole; None: all have the whole's.
        described: conditions of windows of their own; None: there are none.
        share: w.
        stride: cells between windows; None: half a window.
        view_batch_size: windows times samples in one call; None: all.
    """

    def __init__(
        self,
        screened: WindowConditions | None = None,
        described: WindowConditions | None = None,
        *,
        share: float = 0.3,
        stride: int | None = None,
        view_batch_size: int | None = None,
    ) -> None:
        self.share = share
        given = [screened] if described is None else [screened, described]
        self.windows = [
            WindowFusion(stride=stride, view_batch_size=view_batch_size, conditions=conditions)
            for conditions in given
        ]

    def prepare(self, model: Any, native: Any, target: Any, schedule: Any = None) -> None:
        """Note the sizes; the model is left alone."""
        for windows in self.windows:
            windows.prepare(model, native, target)

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Note the step."""
        for windows in self.windows:
            windows.pre_step(x, t, i)
        return x

    def wrap_model(self, fn: ModelCall) -> ModelCall:
        """Return the view's call ``(x, level, cond)``."""
        calls = [windows.wrap_model(fn) for windows in self.windows]

        def by_regions(x: Tensor, level: Level, cond: Conditioning) -> Tensor:
            estimates: list[Tensor] = [call(x, level, cond).sample for call in calls]
            if len(estimates) == 1:
                return estimates[0]
            return torch.lerp(estimates[0], estimates[1], self.share)

        return by_regions
