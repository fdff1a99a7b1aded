"""Operation counts of a backbone, measured by running it on the meta device."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from genscale.backbones.base import Backbone


def meta_twin(model: Backbone) -> Backbone:
    """Return a copy of ``model`` on the meta device, in eval mode, without copying its weights."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        for parameter in model.parameters()
    }
    memo.update({id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()})
    return copy.deepcopy(model, memo).eval()


def count_flops_by_module(model: Backbone, shape: tuple[int, ...]) -> dict[str, int]:
    """Count one sample's forward FLOPs, by module name (``""`` holds the total).

    Matrix products, convolutions and attention are counted, 2 FLOPs a multiply-accumulate;
    element-wise work is not (as in the papers' tables, which print multiply-accumulates).

    Args:
        model: on any device; it is not run and not changed.
        shape: ``(C, H, W)`` of the input.
    """
    twin = meta_twin(model)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        twin(*twin.example(shape, "meta"))
    result = {"": counter.get_total_flops()}
    prefix = type(twin).__name__ + "."
    for name, operations in counter.get_flop_counts().items():
        if name.startswith(prefix):
            result[name.removeprefix(prefix)] = sum(operations.values())
    return result


def count_flops(model: Backbone, shape: tuple[int, ...]) -> int:
    """Count one sample's forward FLOPs (2 a multiply-accumulate)."""
    return count_flops_by_module(model, shape)[""]
