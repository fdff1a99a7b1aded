"""The generator view of a scale-wise network: logits of one scale after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genscale.backbones.base import ScaleBackbone
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import ScaleDecoder, ScalePrediction, ScaleTokens


class ScaleView(ScaleDecoder):
    """A scale-wise backbone and the tokenizer whose tokens it predicts.

    Args:
        backbone: the network; gradients are left as they are.
        tokenizer: of the same codes and scales.
        shape: ``(Cv, H, W)`` of another running latent than the trained one: both then work at
            as many scales that end with it.

    Raises:
        ConfigError: a tokenizer of other scales, codes or channels.
    """

    def __init__(
        self,
        backbone: ScaleBackbone,
        tokenizer: ScaleTokens,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        check_alike(backbone, tokenizer)
        if shape is not None and shape[1:] != backbone.scales[-1]:
            backbone = backbone.at_size(*shape[1:])
            tokenizer = tokenizer.at_scales(backbone.scales)
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.scales = backbone.scales
        self.vocab_size = backbone.vocab_size
        self.needs_prefix = backbone.needs_prefix
        self.sample_shape = backbone.sample_shape
        self.device = next(backbone.parameters()).device

    def begin(self, cond: Conditioning, batch: int) -> Any:
        """Return the memory of trajectories that begin."""
        return self.backbone.begin(cond, batch, self.device)

    def __call__(
        self, features: Tensor, scale: int, cond: Conditioning, memory: Any = None
    ) -> ScalePrediction:
        """Predict the tokens of one scale; one network evaluation."""
        if memory is None:
            memory = self.begin(cond, len(features))
        output = self.backbone(features, cond, range(scale, scale + 1), memory)
        cost = torch.ones(len(features), dtype=torch.float64, device="cpu")
        return ScalePrediction(output.logits, output.memory, cost)


def check_alike(backbone: ScaleBackbone, tokenizer: ScaleTokens | None) -> None:
    """Raise a ``ConfigError`` unless backbone and tokenizer speak of the same tokens."""
    if tokenizer is None or not hasattr(tokenizer, "add_scale"):
        raise ConfigError(
            f"{type(backbone).__name__} predicts the tokens of a multi-scale tokenizer, but the "
            f"autoencoder is {type(tokenizer).__name__}. Give autoencoder=msvq and "
            "autoencoder.run=<a tokenizer run>."
        )
    for name, own, other in (
        ("vocab_size", backbone.vocab_size, tokenizer.vocab_size),
        ("scales", backbone.scales, tokenizer.scales),
    ):
        if own != other:
            raise ConfigError(
                f"model.{name} is {_shown(own)}, but the tokenizer has {_shown(other)}. "
                "Use the tokenizer the model was trained with, or train a model for this one."
            )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return str([h if h == w else [h, w] for h, w in value])
    return str(value)
