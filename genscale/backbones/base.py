"""The contract of a backbone. The only file of this room that touches diffusers' mixins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from genscale.conditioning.base import Conditioning

__all__ = ["Backbone", "BackboneOutput", "register_to_config"]


@dataclass(slots=True)
class BackboneOutput:
    """What a backbone returns.

    Attributes:
        sample: the prediction, in the objective's target space: ``(B, C, H, W)``.
        memory: what the caller hands back at the next step (KV cache, SSM state), or None.
        aux: further outputs by name. ``aux["pyramid"]``: predictions of a multi-resolution
            backbone, coarse first, the last one being ``sample`` itself.
            ``aux["variance"]``: the logits v of a learned variance, shaped as ``sample``, where
            the backbone has ``learn_sigma`` (arXiv:2102.09672, eq. 15 with f = (v + 1) / 2).
    """

    sample: Tensor
    memory: Any = None
    aux: dict[str, Any] = field(default_factory=dict)


class Backbone(ModelMixin, ConfigMixin):
    """A network from a noisy picture to the objective's target; single-device, plain torch.

    Subclasses decorate their keyword-only constructor with ``@register_to_config`` and implement
    :meth:`forward`. ``save_pretrained`` and ``from_pretrained`` then work.
    """

    block_classes: ClassVar[tuple[str, ...]] = ()
    """Names of the block modules: units of FSDP wrapping, checkpointing, regional compile."""

    cached_modules: ClassVar[tuple[str, ...]] = ()
    """``"BlockClass.attribute"``: modules whose outputs step caching may reuse. Each runs once a
    forward and puts out one tensor ``(B, ...)``."""

    config_name = "config.json"  # type: ignore[assignment]  # the mixin's placeholder is None

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None
    ) -> BackboneOutput:
        """Predict the objective's target.

        Args:
            x: ``(B, C, H, W)`` noisy input.
            t: float32 ``(B,)``, or ``(1,)`` when all samples share one time; already the
                number this network expects (the objective's ``time_input``).
            cond: conditions with batch axis B.
            memory: what the previous call returned, or None.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward")  # abstract

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape ``(C, H, W)`` of one input at the trained resolution."""
        size = self.config["input_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return (self.config["in_channels"], height, width)

    def flops(self, shape: tuple[int, ...] | None = None) -> int:
        """Count floating point operations of one forward of one sample (2 a multiply-accumulate).

        Args:
            shape: ``(C, H, W)`` of the input; default :attr:`sample_shape`.
        """
        from genscale.flops import count_flops

        return count_flops(self, shape or self.sample_shape)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must spare; none by default."""
        return set()

    def num_parameters_by_block(self) -> dict[str, int]:
        """Count parameters by direct child module, for the start-up table."""
        counts = {
            name: sum(p.numel() for p in child.parameters())
            for name, child in self.named_children()
        }
        own = sum(p.numel() for p in self.parameters(recurse=False))
        return {**counts, **({"(own)": own} if own else {})}


def parameter_count(module: torch.nn.Module) -> int:
    """Return the number of parameters, each counted once."""
    return sum(p.numel() for p in module.parameters())
