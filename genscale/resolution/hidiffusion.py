"""HiDiffusion (arXiv:2311.17528): attention in moving windows, and a UNet that works smaller."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale import rng
from genscale.errors import ConfigError
from genscale.layers.attention import SelfAttention
from genscale.resolution.base import Patches, ResolutionOp, Sides, extra_tokens
from genscale.resolution.presets import Preset, check_share
from genscale.resolution.scale_fusion import grid_of

SDXL_WINDOWED = (
    "down_blocks.1.attentions.[01].transformer_blocks.[01].attn1",
    "up_blocks.1.attentions.[012].transformer_blocks.[01].attn1",
)
"""Self-attention of SDXL's UNet that is windowed."""

SHIFTS = 4  # a quarter of a window each


class WindowedAttention(ResolutionOp):
    """Attend in 2 x 2 windows of half the grid, which move from step to step (MSW-MSA).

    Windows are moved cyclically by k quarters of their sides, k = 0 .. 3 drawn by step and layer,
    without masks. Grids of odd sides are stretched to even ones and back. Tokens that belong to
    no cell stand before every window; their outputs are averaged.

    Args:
        layers: shell patterns of names of attention layers; None: :data:`SDXL_WINDOWED` where
            there are such layers, else every second self-attention of the network, so that those
            between see the whole (ours).
        seed: of the moves.
    """

    def __init__(self, layers: Sequence[str] | None = None, *, seed: int = 0) -> None:
        self.layers, self.seed = None if layers is None else tuple(layers), seed
        self.step = 0
        self._patches = Patches()

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Note the step."""
        self.step = i
        return x

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """Replace the forward of the layers; see :class:`ResolutionOp`."""
        self.step = 0
        extras = extra_tokens(model)
        for number, module in enumerate(self._chosen(model)):
            replacement = self._forward(module.forward, number, target, extras)
            self._patches.method(module, "forward", replacement)

    def restore(self, model: nn.Module) -> None:
        """Give the layers their forward back."""
        self._patches.undo()

    def shift(self, layer: int) -> int:
        """Return by how many quarters of a window a layer's windows are moved in this step."""
        key = rng.key(self.seed, self.step, rng.Purpose.STEP, torch.tensor([layer]))
        return int(rng.integers(key, SHIFTS)[0])

    def _chosen(self, model: nn.Module) -> list[nn.Module]:
        found = {
            name: module
            for name, module in model.named_modules()
            if (isinstance(module, SelfAttention) and module.rope is None)
            or (hasattr(module, "to_q") and getattr(module, "is_cross_attention", None) is False)
        }
        patterns = SDXL_WINDOWED if self.layers is None else self.layers
        chosen = [
            module
            for name, module in found.items()
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        ]
        if not chosen and self.layers is None:
            chosen = list(found.values())[::2]
        if not chosen:
            raise ConfigError(
                f"{type(model).__name__} has no self-attention without rotary positions named "
                f"like {', '.join(patterns)}, which windows could be put on. Give other names."
            )
        return chosen

    def _forward(
        self, plain: Callable[..., Tensor], layer: int, target: Sides, extras: int
    ) -> Callable[..., Tensor]:
        def windowed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            grid = grid_of(x.shape[1] - extras, target) if x.dim() == 3 else None
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if grid is None or given or min(grid) < 2:
                return plain(x, *args, **kwargs)
            return attend_in_quarters(
                lambda part: plain(part, *args, **kwargs), x, grid, self.shift(layer), extras
            )

        return windowed


def attend_in_quarters(
    attend: Callable[[Tensor], Tensor], x: Tensor, grid: Sides, shift: int, extras: int = 0
) -> Tensor:
    """Attend inside the four quarters of a grid that is first moved round.

    Args:
        attend: from tokens ``(B, n, D)`` to tokens.
        x: ``(B, extras + H W, D)``, row by row.
        grid: H and W, at least 2.
        shift: quarters of a window that the grid is moved by.
        extras: tokens at the front that stand before every window.

    Returns:
        ``(B, extras + H W, D')``.
    """
    front, cells = x[:, :extras], x[:, extras:].transpose(1, 2).unflatten(-1, grid)
    even = (grid[0] + grid[0] % 2, grid[1] + grid[1] % 2)
    if even != grid:
        cells = _resized(cells, even)
    window = (even[0] // 2, even[1] // 2)
    moves = tuple(shift * (side // SHIFTS) for side in window)
    cells = cells.roll((-moves[0], -moves[1]), (-2, -1))
    rows = [part for half in cells.split(window[0], -2) for part in half.split(window[1], -1)]
    tokens = torch.cat(rows).flatten(2).transpose(1, 2)
    y = attend(torch.cat((front.repeat(len(rows), 1, 1), tokens), dim=1))
    outside, inside = y[:, :extras], y[:, extras:].transpose(1, 2).unflatten(-1, window)
    first, second, third, fourth = inside.chunk(4)
    whole = torch.cat(
        (torch.cat((first, second), dim=-1), torch.cat((third, fourth), dim=-1)), dim=-2
    ).roll(moves, (-2, -1))
    if even != grid:
        whole = _resized(whole, grid)
    mean = outside.unflatten(0, (len(rows), -1)).mean(0)
    return torch.cat((mean, whole.flatten(2).transpose(1, 2)), dim=1)


class SmallerUNet(ResolutionOp):
    """Let the inner stages of a UNet work on features half as large in the first steps (RAU-Net).

    Before step ``until`` the features behind the first attention of the second down stage are
    averaged over 2 x 2 cells, and stretched back (bicubic) at the second attention of the mirrored
    up stage. The skips between are met there by features of their own size. ``aggressive``
    instead begins, before step ``early``, with a down-sampling convolution of twice the stride and
    dilation; the UNet passes its skips' sizes on, so that up-samplers land on them.

    Args:
        until: T1, a share of all steps: 0.4 at twice the trained side, 0.7 at four times.
        early: T2, for ``aggressive``.
        steps: of the sampler.
        aggressive: for four times the trained side.
    """

    def __init__(
        self, *, until: float = 0.4, early: float = 0.16, steps: int = 50, aggressive: bool = False
    ) -> None:
        self.until, self.early = round(until * steps), round(early * steps)
        self.aggressive = aggressive
        self.step = 0
        self._patches = Patches()
        self._sides: Sides | None = None

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Note the step."""
        self.step = i
        return x

    @property
    def pools(self) -> bool:
        """Whether features are averaged in this step."""
        return (self.early if self.aggressive else 0) <= self.step < self.until

    @property
    def strides(self) -> bool:
        """Whether the down-sampling convolution has twice its stride in this step."""
        return self.aggressive and self.step < self.early

    def prepare(self, model: Any, native: Sides, target: Sides, schedule: Any = None) -> None:
        """Put hooks on both stages; see :class:`ResolutionOp`."""
        self.step, self._sides = 0, None
        try:
            down, up = model.down_blocks[1], model.up_blocks[1]
            first, second = down.attentions[0], up.attentions[1]
        except (AttributeError, IndexError, TypeError):
            raise ConfigError(
                f"{type(model).__name__} has no second stages with attention on the way down and "
                "up, which HiDiffusion's smaller UNet needs. Use its windows alone."
            ) from None
        self._patches.hook(first.register_forward_hook(self._pool))
        self._patches.hook(second.register_forward_hook(self._stretch))
        # parity with skips: what the pooled stages hand over meets up stages of the same size
        if self.aggressive:
            conv = down.downsamplers[0].conv
            self._patches.method(conv, "forward", self._strided(conv))
            # makes the UNet hand the skips' sizes to its up-samplers
            before = model.num_upsamplers
            model.num_upsamplers = before + 12
            self._patches.call(lambda: setattr(model, "num_upsamplers", before))

    def restore(self, model: nn.Module) -> None:
        """Take the hooks off."""
        self._patches.undo()

    def _pool(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        self._sides = None
        if not self.pools:
            return out
        x = _tensor(out)
        self._sides = (x.shape[-2], x.shape[-1])
        return _like(out, F.avg_pool2d(x, 2, ceil_mode=True))

    def _stretch(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if self._sides is None:
            return out
        sides, self._sides = self._sides, None
        return _like(out, _resized(_tensor(out), sides))

    def _strided(self, conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
        plain = conv.forward

        def forward(x: Tensor) -> Tensor:
            if not self.strides:
                return plain(x)
            return F.conv2d(x, conv.weight, conv.bias, stride=4, padding=2, dilation=2)

        return forward


class HiDiffusion(Preset):
    """Attention in moving windows; of UNets also inner stages that work smaller at first.

    Args:
        layers: see :class:`WindowedAttention`; null: its default.
        smaller: let the inner stages of a UNet work smaller.
        until: share of the steps in which they do.
        steps: of the sampler, for ``until``.
        aggressive: for UNets at four times the trained side.
    """

    name = "hidiffusion"
    needs = ("tokens", "pictures")
    uses = ("tokens",)

    def __init__(
        self,
        *,
        layers: Sequence[str] | None = None,
        smaller: bool = True,
        until: float = 0.4,
        steps: int = 50,
        aggressive: bool = False,
    ) -> None:
        check_share("until", until)
        self.layers = None if layers is None else tuple(layers)
        self.smaller, self.until, self.steps, self.aggressive = smaller, until, steps, aggressive

    def operators(self, model: nn.Module, native: Sides, target: Sides) -> list[ResolutionOp]:
        """Return the windows, and of UNets the smaller stages."""
        ops: list[ResolutionOp] = [WindowedAttention(self.layers)]
        if self.smaller and hasattr(model, "down_blocks"):
            ops.append(SmallerUNet(until=self.until, steps=self.steps, aggressive=self.aggressive))
        return ops


def _resized(x: Tensor, sides: Sides) -> Tensor:
    return F.interpolate(x, size=sides, mode="bicubic", align_corners=False)


def _tensor(out: Any) -> Tensor:
    """Return the features of a module of diffusers, which returns them alone or in a tuple."""
    x: Tensor = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
    return x


def _like(out: Any, x: Tensor) -> Any:
    """Put features in the form that a module returned them in."""
    if isinstance(out, tuple):
        return (x, *out[1:])
    if hasattr(out, "sample"):
        return type(out)(sample=x)
    return x
