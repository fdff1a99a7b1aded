"""The contract of a backbone. The only file of this room that touches diffusers' mixins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.layers.embed import LearnedPositions
from genscale.layers.scales import as_scales, stretched_scales
from genscale.layers.skip_scale import TokenGate

__all__ = [
    "Backbone",
    "BackboneOutput",
    "ScaleBackbone",
    "ScaleOutput",
    "register_to_config",
]


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


@dataclass(slots=True)
class ScaleOutput:
    """What a scale-wise backbone returns.

    Attributes:
        logits: ``(B, N, V)`` float32 of the tokens of the scales asked for.
        memory: what the caller hands back at the next scale, or None.
    """

    logits: Tensor
    memory: Any = None


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

    self_conditioning: ClassVar[bool] = False
    """Whether ``memory`` is ``{"latents": (B, L, D), "known": (B,) bool}``, which may come from
    another noise level: rows not known are computed as without memory."""

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
        """Shape ``(C, H, W)``, of clips ``(C, T, H, W)``, of one input at the trained size."""
        size = self.config["input_size"]
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return (self.config["in_channels"], *sides)

    @property
    def size_step(self) -> tuple[int, int]:
        """What height and width of an input must be multiples of; the default is the patch."""
        patch = self.config.get("patch_size", 1)
        sides = (patch, patch) if isinstance(patch, int) else tuple(patch)
        return sides[-2], sides[-1]

    def size_problem(self, height: int, width: int) -> str | None:
        """Return why inputs of other sides cannot be read, though :attr:`size_step` divides them.

        Args:
            height: rows of the input.
            width: its columns.

        Returns:
            the second half of a sentence, with what to do; None where they can.
        """
        trained = self.sample_shape[-2:]
        if trained == (height, width):
            return None
        if any(isinstance(module, TokenGate) for module in self.modules()):
            return (
                "the gates of its skips have weights for the trained size alone. Leave size out, "
                "or train with a model.skip_scale other than gate and gate_shared."
            )
        crops = any(
            isinstance(module, LearnedPositions) and module.resize == "crop"
            for module in self.modules()
        )
        if crops and (height > trained[0] or width > trained[1]):
            return (
                "its position tables are cropped, not stretched, and have no rows beyond the "
                "trained size. Give a smaller size, or a model with position_resize=interpolate."
            )
        return None

    def example(self, shape: tuple[int, ...], device: torch.device | str) -> tuple[Any, ...]:
        """Return arguments of :meth:`forward` for one sample, to count operations with."""
        x = torch.empty(1, *shape, device=device)
        return (x, torch.empty(1, device=device), self.example_condition(device))

    def example_condition(self, device: torch.device | str) -> Conditioning:
        """Return a condition of one sample as the network reads it."""
        return Conditioning(labels=torch.zeros(1, dtype=torch.int64, device=device))

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


class ScaleBackbone(Backbone):
    """A network that predicts the tokens of a picture scale by scale, coarse first.

    It reads the running latent, resized to every scale, and puts out logits over the codebook
    (arXiv:2404.02905). Its config holds ``scales`` (sides, or ``[height, width]`` pairs),
    ``latent_channels`` and ``vocab_size``.
    """

    needs_prefix: ClassVar[bool] = True
    """Whether a scale reads what earlier ones left in memory. A network that does not can be
    asked about any scale alone."""

    def begin(self, cond: Conditioning, batch: int, device: torch.device) -> Any:
        """Return the memory of a trajectory that begins: all that is computed once a sample.

        Args:
            cond: conditions with batch axis ``batch``, or without any field.
            batch: number of samples B.
            device: where they live.

        Returns:
            nested dicts and lists of tensors whose first axis is the sample.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement begin")  # abstract

    def forward(  # type: ignore[override]  # scales stand in the place of time
        self,
        features: Tensor,
        cond: Conditioning,
        scales: range | None = None,
        memory: Any = None,
    ) -> ScaleOutput:
        """Predict the tokens of consecutive scales.

        Without memory, ``features`` hold all scales from the first on and every scale sees those
        before it and itself (teacher forcing). With memory, scales come in order, as from
        :meth:`begin` on; what was computed there is not computed again and ``cond`` is not read.

        Args:
            features: ``(B, N, Cv)`` running latents resized to each of the scales, row by row,
                joined; the rows of scale 0, where nothing is known, are not read.
            cond: conditions with batch axis B.
            scales: which scales; None for 0 up to as many as ``features`` hold.
            memory: what :meth:`begin` or the scale before returned.

        Raises:
            ValueError: features that do not end with a scale, or scales out of order.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward")  # abstract

    @property
    def scales(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every scale, coarse first."""
        return as_scales(self.config["scales"])

    @property
    def vocab_size(self) -> int:
        """Number of codes V."""
        return int(self.config["vocab_size"])

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape ``(Cv, H, W)`` of the running latent: the last scale's."""
        return (int(self.config["latent_channels"]), *self.scales[-1])

    @property
    def size_step(self) -> tuple[int, int]:
        """One cell: scales are of any size."""
        return 1, 1

    def at_scales(self, scales: Sequence[int | Sequence[int]]) -> Self:
        """Return this network for other scales; weights are shared, this one stays as it is."""
        raise NotImplementedError(f"{type(self).__name__} must implement at_scales")  # abstract

    def at_size(self, height: int, width: int) -> Self:
        """Return this network for running latents of another size; weights are shared.

        It has as many scales; see :func:`~genscale.layers.scales.stretched_scales`.
        """
        scales = stretched_scales(self.scales, height, width)
        return self if scales == self.scales else self.at_scales(scales)

    def example(self, shape: tuple[int, ...], device: torch.device | str) -> tuple[Any, ...]:
        """Return the features of all scales of one sample; ``shape`` is that of the latent."""
        tokens = sum(height * width for height, width in self.scales)
        features = torch.empty(1, tokens, shape[0], device=device)
        return (features, self.example_condition(device))


def parameter_count(module: torch.nn.Module) -> int:
    """Return the number of parameters, each counted once."""
    return sum(p.numel() for p in module.parameters())
