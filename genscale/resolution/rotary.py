"""Rotary frequencies for grids of more cells than in training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.backbones.base import ScaleBackbone
from genscale.backbones.causal_video import CausalVideo
from genscale.errors import ConfigError, did_you_mean
from genscale.layers.norm import upcast
from genscale.layers.rope import AxialRoPE
from genscale.layers.rope3d import VideoRoPE, axis_pairs
from genscale.layers.scale_rope import ScaleRoPE
from genscale.layers.scales import Scales
from genscale.resolution.base import Patches, ResolutionOp, Sides, linear_factor

RotaryVariant = Literal["unscaled", "pi", "ntk", "ntk_exact", "ntk_clip", "yarn", "time_aware"]
"""How frequencies follow the size; see :func:`axis_frequencies`."""

WATERSHED = 0.3  # Lumina-Next's: before it the layout forms


def axis_frequencies(
    channels: int,
    *,
    scale: float = 1.0,
    variant: RotaryVariant = "unscaled",
    theta: float = 10000.0,
    ntk: float | None = None,
    trained_cells: int = 64,
    time: float | None = None,
    watershed: float = WATERSHED,
    device: torch.device | None = None,
) -> Tensor:
    """Return the angles a cell turns the channel pairs of one axis by.

    With omega_k = theta^(-2k / D), k = 0 .. D/2 - 1:

    - ``unscaled``: omega, as trained.
    - ``pi``: omega / s, position interpolation (arXiv:2306.15595).
    - ``ntk``: of the base theta * ntk, as diffusion models take it.
    - ``ntk_exact``: of the base theta * s^(D / (D - 2)): the fastest pair stays, the slowest is
      interpolated.
    - ``ntk_clip``: that of ``ntk``, but never slower than ``pi`` (arXiv:2410.07536).
    - ``yarn``: between ``pi`` and ``unscaled`` by the turns a pair makes over the trained
      side, 1 or fewer to 32 or more (arXiv:2309.00071).
    - ``time_aware``: ``pi`` before the watershed, then ``ntk`` (arXiv:2406.18583).

    Args:
        channels: D of this axis, even.
        scale: s, the side over the trained side.
        variant: which of the above.
        theta: trained base.
        ntk: factor of the base; default s.
        trained_cells: cells along a trained side, for ``yarn``.
        time: 0 at noise, 1 at data, for ``time_aware``.
        watershed: the time at which layout is done.
        device: where to put them.

    Returns:
        ``(D / 2,)`` float64, or float32 on devices that know no float64.

    Raises:
        ConfigError: an unknown variant, or no time where one is needed.
    """
    if variant not in get_args(RotaryVariant):
        raise ConfigError(
            f"rotary must be one of {', '.join(get_args(RotaryVariant))}, but is {variant!r}."
            f"{did_you_mean(variant, get_args(RotaryVariant))}"
        )
    if variant == "time_aware":
        if time is None:
            raise ConfigError(
                "Rotary frequencies that follow the time need one, but none was given. Call "
                "pre_step at every step, or choose another variant."
            )
        variant = "pi" if time < watershed else "ntk"
    dtype = torch.float32 if device is not None and device.type == "mps" else torch.float64
    exponents = torch.arange(0, channels, 2, dtype=dtype, device=device) / channels
    base = theta**-exponents
    wider = (theta * (scale if ntk is None else ntk)) ** -exponents
    if variant == "unscaled":
        return base
    if variant == "pi":
        return base / scale
    if variant == "ntk":
        return wider
    if variant == "ntk_clip":
        return torch.maximum(wider, base / scale)
    if variant == "ntk_exact":
        return (theta * scale ** (channels / max(channels - 2, 1))) ** -exponents
    turns = trained_cells * base / (2 * math.pi)
    kept = ((turns - 1.0) / 31.0).clamp(0.0, 1.0)
    return kept * base + (1.0 - kept) * base / scale


def yarn_logit_factor(scale: float) -> float:
    """Return YaRN's factor of the logits (0.1 ln s + 1)^2, 1 at s <= 1 (arXiv:2309.00071)."""
    return (0.1 * math.log(max(scale, 1.0)) + 1.0) ** 2


def axis_angles(places: Tensor, frequencies: Tensor) -> Tensor:
    """Return ``(..., D / 2)`` angles of places ``(...)``, in the frequencies' precision."""
    return places.to(frequencies.dtype)[..., None] * frequencies


def grid_angles(
    rows: Tensor, columns: Tensor, frequencies: Tensor, *, alternate: bool = False
) -> Tensor:
    """Return ``(H, W, D)`` angles of a grid: D / 2 of the row and D / 2 of the column.

    Args:
        rows: ``(H,)`` places.
        columns: ``(W,)`` places.
        frequencies: ``(D / 2,)``, the same along both axes.
        alternate: row and column take turns, pair by pair, as in Lumina-Next; else those of the
            row come first.
    """
    shape = (len(rows), len(columns), len(frequencies))
    down = axis_angles(rows, frequencies)[:, None].expand(shape)
    across = axis_angles(columns, frequencies)[None].expand(shape)
    if alternate:
        return torch.stack((down, across), dim=-1).flatten(-2)
    return torch.cat((down, across), dim=-1)


def centred_places(count: int, trained: int, device: torch.device | None = None) -> Tensor:
    """Return places ``(count,)`` of which the trained range 0 .. trained - 1 is the middle."""
    return torch.arange(count, device=device) - (count - trained) / 2


def stretched_log_frequencies(log_frequencies: Tensor, scale: float) -> Tensor:
    """Return learned log-frequencies in units of the picture, for s times as many cells a side.

    In units of the picture, keeping them is position interpolation. Here the fastest pair keeps
    its angle a cell (s times as fast in the picture), the slowest keeps its angle in the picture
    and those between change evenly in the logarithm, as NTK-aware scaling does.

    Args:
        log_frequencies: ``(h, K)``, each row a head's.
        scale: s.
    """
    logs = upcast(log_frequencies)
    low, high = logs.amin(-1, keepdim=True), logs.amax(-1, keepdim=True)
    return logs + math.log(scale) * (logs - low) / (high - low).clamp_min(1e-12)


class RotaryScaling(ResolutionOp):
    """Scale rotary frequencies of diffusers' tables by axis, and those of backbones.

    It reaches modules that map ids ``(N, axes)`` to cosines and sines with ``axes_dim`` and
    ``theta`` (FLUX and its kind), and the rows and columns of a
    :class:`~genscale.layers.rope3d.VideoRoPE`. Places of :class:`~genscale.layers.rope.AxialRoPE`
    and :class:`~genscale.layers.scale_rope.ScaleRoPE` are in units of the picture, or of a scale:
    there ``pi`` changes nothing, ``unscaled`` keeps the angle a cell and every kind of NTK is
    :func:`stretched_log_frequencies`. Tables are computed anew at every call, so no cache can be
    stale.

    Args:
        variant: see :func:`axis_frequencies`.
        ntk: factor of the base, see there; I-Max and HiFlow have 10.
        watershed: see there.
    """

    def __init__(
        self,
        variant: RotaryVariant = "ntk",
        *,
        ntk: float | None = None,
        watershed: float = WATERSHED,
    ) -> None:
        axis_frequencies(2, variant=variant, time=0.0)  # refuses unknown names
        self.variant, self.ntk, self.watershed = variant, ntk, watershed
        self.time: float | None = None
        self._patches = Patches()

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Note the time; ``t`` may be a tensor on the CPU."""
        self.time = 1.0 - float(torch.as_tensor(t).flatten()[0])
        return x

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """Replace what the model's rotary tables return; see :class:`ResolutionOp`."""
        scale = linear_factor(native, target)
        for module in model.modules():
            if isinstance(module, AxialRoPE):
                self._patches.method(module, "rotation", self._learned(module, scale))
            elif isinstance(module, VideoRoPE) and isinstance(model, CausalVideo):
                frequencies = self._of_video(module.frequencies, model, scale)
                self._patches.method(module, "frequencies", frequencies)
            elif isinstance(module, ScaleRoPE) and isinstance(model, ScaleBackbone):
                angles = self._of_scales(module.cell_angles, model.scales)
                self._patches.method(module, "cell_angles", angles)
            elif hasattr(module, "axes_dim") and hasattr(module, "theta"):
                self._patches.hook(module.register_forward_hook(self._table(scale)))
        if not len(self._patches):
            raise ConfigError(
                f"{type(model).__name__} has no rotary positions that can be scaled, which rotary "
                "operators need. Use resolution=entropy."
            )

    def restore(self, model: nn.Module) -> None:
        """Remove hooks and replacements."""
        self.time = None
        self._patches.undo()

    def _kind(self) -> RotaryVariant:
        if self.variant != "time_aware":
            return self.variant
        if self.time is None:
            axis_frequencies(2, variant="time_aware")  # says what is missing
        assert self.time is not None
        return "pi" if self.time < self.watershed else "ntk"

    def _table(self, scale: float) -> Callable[..., Any]:
        def replace(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            ids = args[0]
            theta: Any = module.theta
            dims: Any = module.axes_dim
            if not (
                isinstance(out, tuple) and len(out) == 2 and out[0].shape == (len(ids), sum(dims))
            ):
                raise ConfigError(
                    f"{type(module).__name__} does not return one pair of cosines and sines of "
                    f"{sum(dims)} channels a token, which rotary scaling replaces. "
                    "Use resolution=entropy."
                )
            angles = torch.cat(
                [
                    axis_angles(
                        ids[:, axis],
                        axis_frequencies(
                            size,
                            scale=scale,
                            variant=self._kind(),
                            theta=float(theta),
                            ntk=self.ntk,
                            device=ids.device,
                        ),
                    ).repeat_interleave(2, dim=-1)
                    for axis, size in enumerate(dims)
                ],
                dim=-1,
            )
            return angles.cos().to(out[0].dtype), angles.sin().to(out[1].dtype)

        return replace

    def _learned(self, rope: AxialRoPE, scale: float) -> Callable[..., tuple[Tensor, Tensor]]:
        def rotation(positions: Tensor, num_prefix_tokens: int = 0) -> tuple[Tensor, Tensor]:
            axes = []
            for place, learned in ((0, rope.freqs_h), (1, rope.freqs_w)):
                logs = self._in_picture(upcast(learned), scale)
                axes.append(positions[:, place, None] * logs.exp()[:, None])
            angles = F.pad(torch.cat(axes, dim=-1), (0, 0, num_prefix_tokens, 0))
            return angles.cos(), angles.sin()

        return rotation

    def _in_picture(self, log_frequencies: Tensor, scale: float) -> Tensor:
        """Return log-frequencies in units of the picture, for s times as many cells a side."""
        kind = self._kind()
        if kind == "pi":
            return log_frequencies
        if kind == "unscaled":
            return log_frequencies + math.log(scale)
        return stretched_log_frequencies(log_frequencies, scale)

    def _of_video(
        self, plain: Callable[[int, torch.device], Tensor], model: CausalVideo, scale: float
    ) -> Callable[[int, torch.device], Tensor]:
        def frequencies(axis: int, device: torch.device) -> Tensor:
            if axis == 0:  # a video is no longer than before
                return plain(axis, device)
            found = axis_frequencies(
                2 * axis_pairs(model.head_size)[axis],
                scale=scale,
                variant=self._kind(),
                theta=model.rope.theta,
                ntk=self.ntk,
                trained_cells=model.grid[axis - 1],
                device=device,
            )
            # places that are interpolated already lie s times as close
            return found * scale if model.position_resize == "interpolate" else found

        return frequencies

    def _of_scales(
        self, plain: Callable[[int, int, int, torch.device], Tensor], trained: Scales
    ) -> Callable[[int, int, int, torch.device], Tensor]:
        def cell_angles(scale: int, axis: int, count: int, device: torch.device) -> Tensor:
            before = trained[min(scale, len(trained) - 1)][axis]
            finer = (count - 1) / (before - 1) if min(count, before) > 1 else 1.0
            logs = plain(scale, axis, count, device).log()
            return self._in_picture(logs[None], finer)[0].exp()

        return cell_angles
