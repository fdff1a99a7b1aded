"""Words for windows: those that a small run looked at there (arXiv:2407.10738)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.resolution.base import Sides
from genscale.resolution.windows import Box


def opened(masks: Tensor, rounds: int) -> Tensor:
    """Erode and then dilate masks ``(..., H, W)`` by 3 x 3, ``rounds`` times each.

    What lies outside does not erode and does not grow in.
    """
    x = masks.float().flatten(0, -3) if masks.dim() > 3 else masks.float()
    for _ in range(rounds):
        x = 1.0 - F.max_pool2d(1.0 - x, 3, stride=1, padding=1)
    for _ in range(rounds):
        x = F.max_pool2d(x, 3, stride=1, padding=1)
    return x.view(masks.shape) > 0.5


def word_masks(maps: Tensor) -> Tensor:
    """Return where every word has more attention than its mean, small specks removed.

    Args:
        maps: ``(B, M, h, w)``.

    Returns:
        bool, alike; opened by h // 16 rounds.
    """
    above = maps > maps.mean(dim=(-2, -1), keepdim=True)
    return opened(above, maps.shape[-2] // 16)


class WindowPrompts:
    """Leave words out of windows, by a mean over each window of a map a word.

    Args:
        maps: ``(B, M, h, w)`` float32 a word, of any size.
        sides: height and width of the picture that windows are cut from.
    """

    def __init__(self, maps: Tensor, sides: Sides) -> None:
        self.maps = F.interpolate(maps.float(), size=sides, mode="nearest")

    def keep(self, means: Tensor) -> Tensor:
        """Return which words ``(B, M)`` a window with these means keeps."""
        raise NotImplementedError(f"{type(self).__name__} must implement keep")  # abstract

    def __call__(self, cond: Conditioning, boxes: list[Box]) -> Conditioning:
        """Return the conditions of all windows, window after window.

        A window that would keep no word has them all.
        """
        batch, count = len(self.maps), len(boxes)
        windows = cond.select(torch.arange(batch).repeat(count))
        if cond.text is None:
            return windows
        kept = []
        for top, bottom, left, right in boxes:
            part = self.maps[..., max(top, 0) : bottom, max(left, 0) : right]
            kept.append(self.keep(part.mean(dim=(-2, -1))))
        keep = torch.cat(kept).to(cond.text.device)
        mask = windows.text_mask
        if mask is None:
            mask = torch.ones_like(keep)
        screened = mask & keep
        alive = screened.any(dim=-1, keepdim=True)
        return replace(windows, text_mask=torch.where(alive, screened, mask))


class PatchPrompts(WindowPrompts):
    """Keep a word where its mask covers enough of the window.

    Args:
        maps: ``(B, M, h, w)``, see :class:`~genscale.resolution.attention_probe.WordMaps`.
        sides: height and width of the large picture.
        coverage: c, the least share.
    """

    def __init__(self, maps: Tensor, sides: Sides, *, coverage: float = 0.3) -> None:
        super().__init__(word_masks(maps).float(), sides)
        self.coverage = coverage

    def keep(self, means: Tensor) -> Tensor:
        """Compare shares with the least one."""
        return means >= self.coverage


class ScreenedPrompts(WindowPrompts):
    """Leave a word out where its attention is weak, measured by its mean over the picture.

    Args:
        maps: ``(B, M, h, w)``.
        sides: height and width of the large picture.
        floor: the least ratio.
    """

    def __init__(self, maps: Tensor, sides: Sides, *, floor: float = 0.5) -> None:
        mean = maps.mean(dim=(-2, -1), keepdim=True)
        super().__init__(maps / mean.clamp_min(1e-12), sides)
        self.floor = floor

    def keep(self, means: Tensor) -> Tensor:
        """Compare ratios with the least one."""
        return means >= self.floor
