"""Patches whose borders move from step to step, so that none leaves a seam (arXiv:2410.07536)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from genscale.backbones.base import BackboneOutput
from genscale.resolution.base import ModelCall, ResolutionOp, Sides


class SwinPatches(ResolutionOp):
    """On even steps, call the model on the sample with half a patch of zeros around it.

    Patches of one cell have no borders to move; nothing is changed then.

    Args:
        patch: height and width of a patch.
    """

    def __init__(self, patch: Sides) -> None:
        self.patch = patch
        self.step = 0

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Note the step."""
        self.step = i
        return x

    def wrap_model(self, fn: ModelCall) -> ModelCall:
        """Return the model on a moved grid of patches."""
        down, right = (side // 2 for side in self.patch)
        if down == right == 0:
            return fn
        # whole patches in all: half a patch before, the rest after
        after = [side - side // 2 if side > 1 else 0 for side in self.patch]

        def moved(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.step % 2:
                return fn(x, *args, **kwargs)
            height, width = x.shape[-2:]
            wide = F.pad(x, (right, after[1], down, after[0]))
            out = fn(wide, *args, **kwargs)
            y = out if isinstance(out, Tensor) else out.sample
            return BackboneOutput(sample=y[..., down : down + height, right : right + width])

        return moved
