"""Operation counts of a backbone, measured by running it on the meta device."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from genscale.conditioning.base import Conditioning

if TYPE_CHECKING:
    from genscale.backbones.base import Backbone


def count_flops_by_module(model: Backbone, shape: tuple[int, ...]) -> dict[str, int]:
    """Count one sample's forward FLOPs, by module name (``""`` holds the total).

    Matrix products, convolutions and attention are counted, 2 FLOPs a multiply-accumulate;
    element-wise work is not (as in the papers' tables, which print multiply-accumulates).
    """
    twin = copy.deepcopy(model).to("meta").eval()
    x = torch.empty(1, *shape, device="meta")
    t = torch.empty(1, device="meta")
    cond = Conditioning(labels=torch.zeros(1, dtype=torch.int64, device="meta"))
    counter = FlopCounterMode(display=False, depth=None)
    with counter, torch.no_grad():
        twin(x, t, cond)
    table = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    prefix = type(twin).__name__
    result = {"": counter.get_total_flops()}
    for name, value in table.items():
        if name.startswith(prefix + "."):
            result[name[len(prefix) + 1 :]] = value
    return result


def count_flops(model: Backbone, shape: tuple[int, ...]) -> int:
    """Count one sample's forward FLOPs (2 a multiply-accumulate)."""
    return count_flops_by_module(model, shape)[""]
