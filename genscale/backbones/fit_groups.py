"""Clips cut into groups of patches, and back; learned places of patches in a grid of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from genscale.layers.norm import upcast

AXES = ("frames", "height", "width")

_PIXELS = "b c (tg ti pt) (hg hi ph) (wg wi pw)"
_GROUPED = "(b tg hg wg) (ti hi wi) (c pt ph pw)"


@dataclass(frozen=True, slots=True)
class Groups:
    """How a clip ``(T, H, W)`` is cut: pixels make patches, patches make groups.

    Attributes:
        counts: groups along time, height and width; their product is G.
        group: patches along the axes of a group; their product is p.
        patch: pixels along the axes of a patch.
    """

    counts: tuple[int, int, int]
    group: tuple[int, int, int]
    patch: tuple[int, int, int]

    @classmethod
    def of(cls, size: Sequence[int], patch: Sequence[int], group: Sequence[int]) -> Groups:
        """Cut a clip of a size.

        Args:
            size: frames, height and width in pixels.
            patch: in pixels.
            group: in patches.

        Raises:
            ValueError: a side is no multiple of the patch times the group.
        """
        for axis, side, pixels, patches in zip(AXES, size, patch, group, strict=True):
            if side < 1 or side % (pixels * patches):
                raise ValueError(
                    f"A clip's {axis} must be a multiple of patch times group, but is {side}, "
                    f"with model.patch_size {pixels} and model.group_size {patches} along it. "
                    f"Give a multiple of {pixels * patches}, or change one of them."
                )
        counts = [s // (p * g) for s, p, g in zip(size, patch, group, strict=True)]
        return cls(_three(counts), _three(group), _three(patch))

    @property
    def number(self) -> int:
        """Number of groups G."""
        return self.counts[0] * self.counts[1] * self.counts[2]

    @property
    def length(self) -> int:
        """Patches p of a group."""
        return self.group[0] * self.group[1] * self.group[2]

    def cut(self, clip: Tensor) -> Tensor:
        """Return ``(B G, p, C pt ph pw)`` of a clip ``(B, C, T, H, W)``, contiguous."""
        return rearrange(clip, f"{_PIXELS} -> {_GROUPED}", **self._sides()).contiguous()

    def join(self, patches: Tensor) -> Tensor:
        """Return the clip ``(B, C, T, H, W)`` of ``(B G, p, C pt ph pw)``, contiguous."""
        return rearrange(patches, f"{_GROUPED} -> {_PIXELS}", **self._sides()).contiguous()

    def _sides(self) -> dict[str, int]:
        names = ("tg", "hg", "wg", "ti", "hi", "wi", "pt", "ph", "pw")
        return dict(zip(names, (*self.counts, *self.group, *self.patch), strict=True))


class GroupedPositions(nn.Module):
    """One learned vector a patch of the trained clip, stored group by group.

    For a clip of another size the vectors are stretched over its patches (trilinear), so that each
    keeps its place in the picture: out of the order of groups, and back into the new one.

    Args:
        groups: of the trained clip.
        size: width D.
        shared: keep the vectors of one group, which all groups have in common.
    """

    def __init__(self, groups: Groups, size: int, *, shared: bool = False) -> None:
        super().__init__()
        self.groups, self.shared = groups, shared
        self.table = nn.Parameter(
            torch.empty(groups.length * (1 if shared else groups.number), size)
        )

    def forward(self, groups: Groups) -> Tensor:
        """Return ``(G, p, D)``, or ``(1, p, D)`` where groups share them."""
        if self.shared:
            return self.table[None]
        if groups == self.groups:
            return self.table.unflatten(0, (groups.number, groups.length))
        plain = "d (tg ti) (hg hi) (wg wi)"
        # patches stand in the place of pixels
        grid = rearrange(
            upcast(self.table),
            f"(tg hg wg ti hi wi) d -> {plain}",
            **dict(zip(("tg", "hg", "wg", "ti", "hi", "wi"),
                       (*self.groups.counts, *self.groups.group), strict=True)),
        )  # fmt: skip
        sides = [count * side for count, side in zip(groups.counts, groups.group, strict=True)]
        stretched = F.interpolate(grid[None], size=sides, mode="trilinear")[0]
        return rearrange(
            stretched.to(self.table.dtype),
            f"{plain} -> (tg hg wg) (ti hi wi) d",
            **dict(zip(("tg", "hg", "wg"), groups.counts, strict=True)),
            **dict(zip(("ti", "hi", "wi"), groups.group, strict=True)),
        )


def _three(sides: Sequence[int]) -> tuple[int, int, int]:
    first, second, third = (int(side) for side in sides)
    return first, second, third
