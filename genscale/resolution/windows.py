"""Large pictures from many calls at the trained size: overlapping windows and dilated samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale import rng
from genscale.backbones.base import BackboneOutput
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import Level
from genscale.resolution.base import ModelCall, ResolutionOp

Box = tuple[int, int, int, int]
"""First row, row after the last, first column, column after the last."""

WindowConditions = Callable[[Conditioning, list[Box]], Conditioning]
"""From the conditions of B samples and V windows to those of V B windows, window after window.

Windows that move may reach a few cells beyond the picture."""


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows along one side start; the last one is moved back inside."""
    if length <= window:
        return [0]
    count = -(-(length - window) // stride) + 1
    return [min(i * stride, length - window) for i in range(count)]


def window_boxes(height: int, width: int, window: int, stride: int) -> list[Box]:
    """Return the windows that cover a grid, row by row (arXiv:2302.08113).

    A grid smaller than the window along one side has windows as large as itself there.

    Raises:
        ConfigError: a stride that leaves gaps or none.
    """
    if not 0 < stride <= window:
        raise ConfigError(
            f"The stride of windows must be between 1 and their side {window}, but is {stride}. "
            "Half the side is usual."
        )
    return [
        (top, min(top + window, height), left, min(left + window, width))
        for top in window_starts(height, window, stride)
        for left in window_starts(width, window, stride)
    ]


def jittered(boxes: list[Box], height: int, width: int, jitter: int, keys: Tensor) -> list[Box]:
    """Move every window by up to ``jitter`` cells either way, on a grid widened by as many.

    Windows at an edge move outwards only, so that everything stays covered while ``jitter`` is at
    most (window - stride) / 2 (arXiv:2311.16973). One that spans a whole side stays there.
    The boxes returned are those of the grid with ``jitter`` cells added on every side.

    Args:
        boxes: of :func:`window_boxes`.
        height: of the grid.
        width: of the grid.
        jitter: the largest move; (window - stride) / 4 is usual.
        keys: two int64 keys (see :mod:`genscale.rng`), for rows and for columns.
    """
    moves = rng.uniform(keys, (len(boxes),)).tolist()

    def move(share: float, first: int, last: int, length: int) -> int:
        low = 0 if last == length else -jitter
        high = 0 if first == 0 else jitter
        return low + min(int(share * (high - low + 1)), high - low) + jitter

    result = []
    for index, (top, bottom, left, right) in enumerate(boxes):
        down = move(moves[0][index], top, bottom, height)
        across = move(moves[1][index], left, right, width)
        result.append((top + down, bottom + down, left + across, right + across))
    return result


def crop_windows(x: Tensor, boxes: list[Box]) -> Tensor:
    """Return the V windows of ``(B, C, H, W)``, window after window, as ``(V B, C, h, w)``."""
    return torch.cat([x[..., top:bottom, left:right] for top, bottom, left, right in boxes])


def fuse_windows(parts: Tensor, boxes: list[Box], height: int, width: int) -> Tensor:
    """Average windows ``(V B, C, h, w)`` where they overlap into ``(B, C, H, W)``.

    Cells that no window covers are zero.
    """
    batch = len(parts) // len(boxes)
    total = parts.new_zeros(batch, *parts.shape[1:-2], height, width)
    count = parts.new_zeros(height, width)
    for part, (top, bottom, left, right) in zip(parts.split(batch), boxes, strict=True):
        total[..., top:bottom, left:right] += part
        count[top:bottom, left:right] += 1
    return total / count.clamp_min(1)


def split_dilated(x: Tensor, factor: int) -> Tensor:
    """Return every s-th cell from each of the s^2 starts: ``(s^2 B, C, ceil(H/s), ceil(W/s))``.

    Sides that s does not divide get zeros at the top and on the left.
    """
    x = F.pad(x, (-x.shape[-1] % factor, 0, -x.shape[-2] % factor, 0))
    return torch.cat([x[..., i::factor, j::factor] for i in range(factor) for j in range(factor)])


def merge_dilated(parts: Tensor, factor: int, height: int, width: int) -> Tensor:
    """Undo :func:`split_dilated`; returns ``(B, C, height, width)``."""
    batch = len(parts) // factor**2
    rows, columns = parts.shape[-2] * factor, parts.shape[-1] * factor
    x = parts.new_empty(batch, *parts.shape[1:-2], rows, columns)
    for index, part in enumerate(parts.split(batch)):
        x[..., index // factor :: factor, index % factor :: factor] = part
    return x[..., rows - height :, columns - width :]


def interaction(parts: int, shape: tuple[int, ...], key: Tensor) -> Tensor:
    """Return a permutation of the sub-samples for every cell, ``(parts, *shape)`` int64.

    AccDiffusion (arXiv:2407.10738) lets dilated samples meet so: the model sees them mixed.

    Args:
        parts: sub-samples s^2.
        shape: of one sub-sample, ``(B, C, h, w)``.
        key: an int64 key.
    """
    return rng.uniform(key, (parts, *shape)).argsort(dim=0)


def mix_dilated(parts: Tensor, order: Tensor, *, inverse: bool = False) -> Tensor:
    """Permute sub-samples ``(s^2 B, C, h, w)`` by :func:`interaction`, or undo it.

    An order of one sample serves all, and one of C channels each further C of them.
    """
    order = order.to(parts.device)
    grouped = parts.unflatten(0, (len(order), -1))  # (s^2, B, C, h, w)
    further = grouped.shape[2] // order.shape[2]
    order = order.repeat(1, 1, further, *[1] * (order.dim() - 3))
    order = order.expand(-1, grouped.shape[1], *order.shape[2:])
    return grouped.gather(0, order.argsort(dim=0) if inverse else order).flatten(0, 1)


def take_samples(value: Any, index: Tensor, batch: int) -> Any:
    """Return an argument of a model for the samples ``index`` of a batch.

    Tensors, levels and conditions of ``batch`` samples are indexed; what all share is returned as
    it is.
    """
    if isinstance(value, Conditioning | Level):
        return value.select(index) if len(value) == batch else value
    if isinstance(value, Tensor) and value.dim() and len(value) == batch:
        return value[index.to(value.device)]
    if isinstance(value, Mapping):
        return {name: take_samples(item, index, batch) for name, item in value.items()}
    return value


def call_in_batches(
    fn: ModelCall,
    parts: Tensor,
    batch: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    budget: int | None,
) -> Tensor:
    """Call a model on many parts of each sample, at most ``budget`` at once; return predictions.

    Args:
        fn: (x, ...) -> tensor or an output with ``sample``.
        parts: ``(V batch, C, h, w)``, part after part.
        batch: samples B the other arguments belong to.
        args: further arguments of ``batch`` samples.
        kwargs: likewise, by name.
        budget: None calls once.
    """
    index = torch.arange(len(parts)) % batch

    def outputs() -> Iterator[Tensor]:
        for rows, chosen in zip(
            parts.split(budget or len(parts)), index.split(budget or len(parts)), strict=True
        ):
            some = [take_samples(value, chosen, batch) for value in args]
            named = {name: take_samples(value, chosen, batch) for name, value in kwargs.items()}
            out = fn(rows, *some, **named)
            yield out if isinstance(out, Tensor) else out.sample

    return torch.cat(list(outputs()))


class WindowFusion(ResolutionOp):
    """Call the model on overlapping windows of the trained size and average what it predicts.

    MultiDiffusion averages the windows' next samples; a solver step is linear in sample and
    prediction and the sample is the same in all windows, so that averaging predictions gives the
    same, under any solver and without stepping a scheduler once a window.

    Args:
        window: side of a window in cells; default the trained side (native's height).
        stride: between windows; default half the window.
        jitter: see :func:`jittered`; 0 leaves windows in place.
        seed: of the moves, which change with the step.
        view_batch_size: windows times samples in one call; default all.
        conditions: from the conditions of B samples and the windows to those of every window,
            window after window; default those of the whole for all.
    """

    def __init__(
        self,
        window: int | None = None,
        stride: int | None = None,
        *,
        jitter: int = 0,
        seed: int = 0,
        view_batch_size: int | None = None,
        conditions: WindowConditions | None = None,
    ) -> None:
        self.window, self.stride, self.jitter, self.seed = window, stride, jitter, seed
        self.view_batch_size, self.conditions = view_batch_size, conditions
        self.step = self._side = self._stride = 0

    def prepare(self, model: Any, native: Any, target: Any, schedule: Any = None) -> None:
        """Note the trained side; the model is left alone."""
        self._side, self.step = self.window or native[0], 0
        self._stride = self.stride or max(self._side // 2, 1)
        if not 0 <= 2 * self.jitter <= self._side - self._stride:
            raise ConfigError(
                f"Windows of side {self._side} and stride {self._stride} must move by at most "
                f"{max(self._side - self._stride, 0) // 2} cells to leave no gap, but jitter is "
                f"{self.jitter}. Give less jitter or a smaller stride."
            )

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Note the step."""
        self.step = i
        return x

    def wrap_model(self, fn: ModelCall) -> ModelCall:
        """Return the model that works by windows on ``(B, C, H, W)``."""

        def by_windows(x: Tensor, *args: Any, **kwargs: Any) -> BackboneOutput:
            height, width = x.shape[-2:]
            boxes = window_boxes(height, width, self._side, self._stride)
            j = self.jitter if len(boxes) > 1 else 0
            if j:
                keys = rng.key(
                    self.seed, self.step, rng.Purpose.STEP, torch.arange(2, dtype=torch.int64)
                )
                boxes, x = jittered(boxes, height, width, j, keys), F.pad(x, (j, j, j, j))
            parts, batch = crop_windows(x, boxes), len(x)
            if self.conditions is not None:
                places = [
                    (top - j, bottom - j, left - j, right - j) for top, bottom, left, right in boxes
                ]
                rows, batch = torch.arange(len(parts)) % batch, len(parts)
                args = tuple(self._of_windows(value, rows, len(x), places) for value in args)
            out = call_in_batches(fn, parts, batch, args, kwargs, self.view_batch_size)
            whole = fuse_windows(out, boxes, height + 2 * j, width + 2 * j)
            return BackboneOutput(sample=whole[..., j : j + height, j : j + width])

        return by_windows

    def _of_windows(self, value: Any, rows: Tensor, batch: int, places: list[Box]) -> Any:
        """Return an argument for every window of every sample."""
        if isinstance(value, Conditioning) and self.conditions is not None:
            return self.conditions(value, places)
        return take_samples(value, rows, batch)


class DilatedSampling(ResolutionOp):
    """Call the model on s^2 interleaved samples of the trained size and put them together again.

    Args:
        factor: s; default the whole number nearest to the side over the trained side.
        interact: mix the sub-samples cell by cell before the call, see :func:`interaction`.
        seed: of the mixing, which changes with the step.
        view_batch_size: sub-samples times samples in one call; default all.
    """

    def __init__(
        self,
        factor: int | None = None,
        *,
        interact: bool = False,
        seed: int = 0,
        view_batch_size: int | None = None,
    ) -> None:
        self.factor, self.interact, self.seed = factor, interact, seed
        self.view_batch_size = view_batch_size
        self.step = 0
        self._factor = 1

    def prepare(self, model: Any, native: Any, target: Any, schedule: Any = None) -> None:
        """Note the factor; the model is left alone."""
        self._factor = self.factor or max(round(target[0] / native[0]), 1)
        self.step = 0

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Note the step."""
        self.step = i
        return x

    def wrap_model(self, fn: ModelCall) -> ModelCall:
        """Return the model that works by interleaved samples on ``(B, C, H, W)``."""

        def by_parts(x: Tensor, *args: Any, **kwargs: Any) -> BackboneOutput:
            factor, order = self._factor, None
            parts = split_dilated(x, factor)
            if self.interact:
                key = rng.key(self.seed, self.step, rng.Purpose.STEP, 2)
                # the same for all samples, so that none depends on those beside it
                order = interaction(factor**2, (1, *parts.shape[1:]), key)
                parts = mix_dilated(parts, order)
            out = call_in_batches(fn, parts, len(x), args, kwargs, self.view_batch_size)
            if order is not None:
                out = mix_dilated(out, order, inverse=True)
            return BackboneOutput(sample=merge_dilated(out, factor, *x.shape[-2:]))

        return by_parts
