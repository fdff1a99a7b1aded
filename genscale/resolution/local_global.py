"""DemoFusion's two ways of looking at a large picture (arXiv:2311.16973), and what they see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Level, on
from genscale.objectives.schedule import LinearFlow
from genscale.resolution.base import ModelCall, ResolutionOp, Sides, linear_factor
from genscale.resolution.flow_guided import as_number, skip_weight
from genscale.resolution.frequency import gaussian_blur, match_statistics
from genscale.resolution.windows import Box, DilatedSampling, WindowFusion


class LocalGlobal(ResolutionOp):
    """Predict by windows, and by interleaved samples of a blurred picture; mix both.

    A view's call is replaced, not a network's: what is mixed is the estimate of the noise (of
    flows, the velocity), with which the solver then steps from the picture that is not blurred.

    Args:
        exponent: of the share of interleaved samples, see
            :func:`~genscale.resolution.flow_guided.skip_weight`.
        blur_exponent: of the blur's deviation sigma (0.99 c^e + 0.01).
        sigma: see there.
        stride: cells between windows; None: half a window.
        jitter: cells by which windows move; None: (window - stride) / 4.
        interact: let interleaved samples meet, as AccDiffusion does.
        unit: sides of interleaved samples are multiples of it.
        seed: of jitter and interaction.
        conditions: from the conditions of B samples and the windows to those of every window,
            window after window; None: all windows have those of the whole.
        view_batch_size: windows times samples in one call; None: all.
    """

    def __init__(
        self,
        *,
        exponent: float = 1.0,
        blur_exponent: float = 1.0,
        sigma: float = 1.0,
        stride: int | None = None,
        jitter: int | None = None,
        interact: bool = False,
        unit: Sides = (1, 1),
        seed: int = 0,
        conditions: Callable[[Conditioning, list[Box]], Conditioning] | None = None,
        view_batch_size: int | None = None,
    ) -> None:
        self.exponent, self.blur_exponent, self.sigma = exponent, blur_exponent, sigma
        self.stride, self.jitter, self.unit = stride, jitter, unit
        self.seed, self.view_batch_size, self.conditions = seed, view_batch_size, conditions
        self.dilated = DilatedSampling(
            interact=interact, seed=seed, view_batch_size=view_batch_size
        )
        self.windows = WindowFusion()
        self._share: Callable[[float], float] = float
        self._time = 1.0

    def prepare(self, model: Any, native: Any, target: Any, schedule: Any = None) -> None:
        """Note the sizes and the noising process; the model is left alone."""
        stride = self.stride or max(native[0] // 2, 1)
        jitter = (native[0] - stride) // 4 if self.jitter is None else self.jitter
        self.windows = WindowFusion(
            native[0],
            stride,
            jitter=jitter,
            seed=self.seed,
            view_batch_size=self.view_batch_size,
            conditions=self.conditions,
        )
        self.windows.prepare(model, native, target)
        self.dilated.factor = max(round(linear_factor(native, target)), 1)
        self.dilated.prepare(model, native, target)
        self._share = getattr(schedule, "share", float)

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Note time and step."""
        self._time = as_number(t)
        self.windows.pre_step(x, t, i)
        self.dilated.pre_step(x, t, i)
        return x

    def wrap_model(self, fn: ModelCall) -> ModelCall:
        """Return the view's call ``(x, level, cond)`` whose channels are clean, noise, ..."""
        local, interleaved = self.windows.wrap_model(fn), self.dilated.wrap_model(fn)

        def mixed(x: Tensor, level: Level, cond: Conditioning) -> Tensor:
            near: Tensor = local(x, level, cond).sample
            share = self._share(self._time)
            weight = skip_weight(share, self.exponent)
            factor = self.dilated.factor or 1
            if weight == 0.0 or factor == 1:
                return near
            sigma = self.sigma * (0.99 * skip_weight(share, self.blur_exponent) + 0.01)
            blurred = match_statistics(gaussian_blur(x, 2 * factor - 1, sigma), x)
            height, width = x.shape[-2:]
            rows, columns = (factor * side for side in self.unit)
            padded = F.pad(blurred, (-width % columns, 0, -height % rows, 0))
            far: Tensor = interleaved(padded, level, cond).sample[..., -height:, -width:]
            clean, noise, *rest = far.split(x.shape[1], dim=1)
            clean, noise = carried_over(clean, noise, blurred, x, level)
            return torch.lerp(near, torch.cat([clean, noise, *rest], dim=1), weight)

        return mixed


def carried_over(
    clean: Tensor, noise: Tensor, seen: Tensor, x: Tensor, level: Level
) -> tuple[Tensor, Tensor]:
    """Return both estimates at ``x``, of a prediction made at a picture ``seen`` in its place.

    The estimate of the noise is kept, as programs do that predict noise. Where levels are those
    of a straight flow, the velocity noise - clean is, which stays finite at pure noise.

    Args:
        clean: estimate at ``seen``.
        noise: likewise.
        seen: ``(B, C, H, W)``.
        x: alike.
        level: of both.
    """
    alpha, sigma = on(level.alpha, x), on(level.sigma, x)
    straight = LinearFlow().coefficients(level.sigma)[0]
    if bool(torch.isclose(straight, level.alpha, rtol=0.0, atol=1e-9).all()):
        return clean + (x - seen), noise + (x - seen)
    return (x - sigma * noise) / alpha, noise
