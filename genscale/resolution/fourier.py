"""Dilated convolutions behind a low-pass filter of the trained band (arXiv:2403.12963)."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.resolution.base import Sides, linear_factor
from genscale.resolution.branches import check_halves, prediction_of, rows_of, with_prediction
from genscale.resolution.dilated import SDXL_LAYERS, ConvReplacement, dilated_conv
from genscale.resolution.frequency import low_pass


def fourier_mask(
    height: int,
    width: int,
    scale: float,
    value: float = 0.6,
    *,
    weak: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Return FouriScale's mask of shifted spectra, ``(H, W)`` float32.

    The product over both axes of m(i) = clamp((1 - v) / R (H / 2s + 1 - i) + 1, v, 1), i counted
    from the middle both ways: 1 within the trained band, then falling to v over R frequencies.

    Args:
        height: rows H.
        width: columns W.
        scale: s, the side over the trained side, as this layer sees it.
        value: v.
        weak: R = (s - 1) H / 2s instead of H / 8; all passes at s = 1 then.
        device: where to put it.
    """

    def along(count: int) -> Tensor:
        fall = int((scale - 1) * count // (2 * scale)) if weak else max(count // 8, 1)
        if fall == 0:
            return torch.ones(count, dtype=torch.float64)
        # both middle places of an even side count as 0; an odd side has one
        place = (2 * torch.arange(count, dtype=torch.float64) + 1 - count).abs().div(2).floor()
        mask = (1 - value) / fall * (count // 2 / scale + 1 - place) + 1
        return mask.clamp(value, 1.0)

    return (along(height)[:, None] * along(width)).float().to(device)


def filtered(
    x: Tensor, base: Sides, scale: float, value: float = 0.6, *, weak: bool = False
) -> Tensor:
    """Filter pictures ``(B, C, H, W)`` by :func:`fourier_mask`, zeros filling whole bases.

    Args:
        x: the pictures.
        base: height and width of the trained picture at this layer.
        scale: see :func:`fourier_mask`.
        value: see there.
        weak: see there.
    """
    if value == 1.0:
        return x  # nothing is damped
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, -width % base[1], 0, -height % base[0]))
    rows, columns = padded.shape[-2:]
    mask = fourier_mask(rows, columns, scale, value, weak=weak, device=x.device)
    return low_pass(padded, mask)[..., :height, :width]


def fourier_conv(
    x: Tensor, conv: nn.Conv2d, dilation: float, base: Sides, value: float = 0.6
) -> Tensor:
    """Filter and convolve a batch of thirds [unconditional, strong, weak].

    The first two get the strong filter and dilation ceil(d), the last one the weak filter and
    dilation ceil(max(d / 1.5, 1)).

    Args:
        x: ``(3 B, C, H, W)``.
        conv: of odd kernels.
        dilation: d.
        base: see :func:`filtered`.
        value: see :func:`fourier_mask`.

    Returns:
        ``(3 B, C', H / stride, W / stride)``.

    Raises:
        ValueError: a batch that is not three of a kind.
    """
    if len(x) % 3:
        raise ValueError(
            f"The batch must be thirds [unconditional, strong, weak], but has {len(x)} samples. "
            "Join three branches a sample."
        )
    scale = max(dilation / conv.stride[0], 1.0)
    strong, weak = x.split([len(x) // 3 * 2, len(x) // 3])
    return torch.cat(
        (
            dilated_conv(filtered(strong, base, scale, value), conv, math.ceil(dilation)),
            dilated_conv(
                filtered(weak, base, scale, value, weak=True),
                conv,
                math.ceil(max(dilation / 1.5, 1.0)),
            ),
        )
    )


def fourier_dilation_at(step: int, dilation: float, start: int, stop: int) -> float:
    """Return d before step ``start``, falling evenly to 1 at ``stop``, and 1 after it."""
    if step < start:
        return dilation
    if step >= stop:
        return 1.0
    return 1.0 + (dilation - 1.0) * (stop - step) / (stop - start)


class FourierConvs(ConvReplacement):
    """Filter and dilate listed convolutions during the first steps (FouriScale).

    The batch must hold three branches a sample, see :func:`fourier_conv`; guide with
    unconditional + w (weak - unconditional).

    Args:
        layers: see :class:`~genscale.resolution.dilated.ConvReplacement`.
        dilation: d; default the side over the trained side.
        value: see :func:`fourier_mask`.
        start: step before which d is constant.
        stop: step from which the plain convolution is computed.
    """

    def __init__(
        self,
        layers: Sequence[str] = SDXL_LAYERS,
        *,
        dilation: float | None = None,
        value: float = 0.6,
        start: int = 20,
        stop: int = 35,
    ) -> None:
        super().__init__(layers)
        self.dilation, self.value, self.start, self.stop = dilation, value, start, stop
        self._factor, self._ratio = 1.0, (1.0, 1.0)

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """See :class:`~genscale.resolution.dilated.ConvReplacement`."""
        super().prepare(model, native, target, schedule)
        self._factor = self.dilation or max(linear_factor(native, target), 1.0)
        self._ratio = native[0] / target[0], native[1] / target[1]

    def convolve(self, conv: nn.Conv2d, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Filter and dilate, or compute the plain convolution where the dilation is 1."""
        dilation = self.dilation_now()
        if dilation <= 1:
            return plain(x)
        base = (
            max(round(x.shape[-2] * self._ratio[0]), 1),
            max(round(x.shape[-1] * self._ratio[1]), 1),
        )
        return fourier_conv(x, conv, dilation, base, self.value_of(conv))

    def dilation_now(self) -> float:
        """Return the dilation of the step."""
        return fourier_dilation_at(self.step, self._factor, self.start, self.stop)

    def value_of(self, conv: nn.Conv2d) -> float:
        """Return what the filter before a convolution leaves of high frequencies."""
        return self.value


class FouriScaleBranches(FourierConvs):
    """FouriScale on batches [unconditional, conditional], as pipelines have them.

    The conditional half goes through the network a second time as the weak branch, whose
    self-attention takes the queries and keys of the strong one, and the weak prediction stands in
    the conditional half's place. Convolutions behind upsamplings are dilated but not filtered.
    A step costs half as much again.

    Args:
        layers: see :class:`FourierConvs`, as are all others.
        unfiltered: shell patterns of those that are not filtered.
    """

    def __init__(
        self,
        layers: Sequence[str] = SDXL_LAYERS,
        *,
        unfiltered: Sequence[str] = ("*upsamplers*",),
        dilation: float | None = None,
        value: float = 0.6,
        start: int = 20,
        stop: int = 35,
    ) -> None:
        super().__init__(layers, dilation=dilation, value=value, start=start, stop=stop)
        self.unfiltered = tuple(unfiltered)
        self._unfiltered: set[nn.Module] = set()
        self._threefold = False

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """See :class:`~genscale.resolution.dilated.ConvReplacement`."""
        super().prepare(model, native, target, schedule)
        self._unfiltered = {
            module
            for name, module in model.named_modules()
            if any(fnmatch.fnmatch(name, pattern) for pattern in self.unfiltered)
        }
        for layer in model.modules():
            if getattr(layer, "is_cross_attention", None) is False:
                for part in (layer.get_submodule("to_q"), layer.get_submodule("to_k")):
                    self._patches.hook(part.register_forward_hook(self._shared))
        self._patches.method(model, "forward", self._branched(model.forward))

    def restore(self, model: nn.Module) -> None:
        """Give network, layers and convolutions back what they did."""
        super().restore(model)
        self._unfiltered = set()

    def value_of(self, conv: nn.Conv2d) -> float:
        """Return what the filter before a convolution leaves of high frequencies."""
        return 1.0 if conv in self._unfiltered else self.value

    def _shared(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if not self._threefold:
            return out
        strong = out[: len(out) // 3 * 2]
        return torch.cat((strong, strong[len(strong) // 2 :]))

    def _branched(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.dilation_now() <= 1:
                return plain(x, *args, **kwargs)
            check_halves(x, "FouriScale", "use resolution=scalecrafter")
            half = torch.arange(len(x), device=x.device).chunk(2)
            rows = torch.cat((*half, half[1]))
            self._threefold = True
            try:
                out = plain(*rows_of((x, *args), len(x), rows), **rows_of(kwargs, len(x), rows))
            finally:
                self._threefold = False
            uncond, _, weak = prediction_of(out).chunk(3)
            return with_prediction(out, torch.cat((uncond, weak)))

        return forward
