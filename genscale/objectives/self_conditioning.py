"""Self-conditioning in training: a first evaluation whose latents the second one remembers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genscale.backbones.base import Backbone
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError


def remembered(
    backbone: Backbone, x: Tensor, t: Tensor, cond: Conditioning, known: Tensor
) -> dict[str, Tensor]:
    """Return the memory of samples that have been evaluated once, without gradients.

    The whole batch is evaluated, so that shapes do not depend on the draw.

    Args:
        backbone: a network with ``self_conditioning``.
        x: what it is fed.
        t: its time input.
        cond: its conditions.
        known: ``(B,)`` bool: which samples remember; the others do as if they had no memory.

    Raises:
        ConfigError: the network remembers nothing.
    """
    if not getattr(backbone, "self_conditioning", False):
        raise ConfigError(
            f"objective.self_conditioning trains a network to use what it remembers, but "
            f"{type(backbone).__name__} remembers nothing. Pass objective.self_conditioning=0."
        )
    kind = x.device.type
    # autocast keeps the weights it has cast, here without gradients, and the second evaluation
    # would find them: a cast of its own each
    with (
        torch.no_grad(),
        torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        ),
    ):
        memory: dict[str, Any] = backbone(x, t, cond).memory
    return {
        "latents": memory["latents"].detach(),
        "known": known.to(x.device, non_blocking=True),
    }
