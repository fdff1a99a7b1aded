"""Sampling of scale-wise models as the official programs do it: their quantiser, their draws."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genscale.autoencoders.quantizer import ScaleQuantizer
from genscale.backbones.base import ScaleBackbone
from genscale.conditioning.base import NULL_LABEL, Conditioning
from genscale.guidance.scale_wise import ScaleGuidance
from genscale.layers.scales import Scales
from genscale.objectives.next_scale import NextScale as Objective
from genscale.samplers.next_scale import NextScale
from genscale.samplers.token_filters import filter_logits, smooth_weights


class QuantizerAlone(nn.Module):
    """The part of a tokenizer that samplers need, of an official file's ``quantize.*`` tensors.

    Args:
        state: official keys.
        scales: sides of the scales.
        config: the official settings of the quantiser.
    """

    def __init__(
        self, state: Mapping[str, Tensor], scales: Sequence[int], config: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.vocab_size, channels = state["quantize.embedding.weight"].shape
        self.quantizer = ScaleQuantizer(
            vocab_size=self.vocab_size,
            latent_channels=channels,
            scales=scales,
            num_phis=config["share_quant_resi"] or None,
            phi_weight=abs(config["quant_resi"]),
        )
        weights = {"embedding.weight": state["quantize.embedding.weight"]}
        phi = re.compile(r"quantize\.quant_resi\.(?:qresi_ls\.|qresi\.)?(?:(\d+)\.)?(\w+)")
        for name, tensor in state.items():
            if match := phi.fullmatch(name):
                weights[f"phis.{match[1] or 0}.{match[2]}"] = tensor
        own = self.quantizer.state_dict()
        self.quantizer.load_state_dict({"hits": own["hits"], **weights})

    @property
    def scales(self) -> Scales:
        """Height and width of every scale."""
        return self.quantizer.scales

    def codes(self, tokens: Tensor) -> Tensor:
        """Look tokens up."""
        return self.quantizer.codes(tokens)

    def add_scale(self, running: Tensor, codes: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Add one scale to the running latent."""
        return self.quantizer.add_scale(running, codes, scale)


@dataclass(frozen=True)
class Run:
    """What sampling gave: ``tokens (B, L)``, guided ``logits`` of every scale, ``latent``."""

    tokens: Tensor
    logits: list[Tensor]
    latent: Tensor


@torch.no_grad()
def sample(model: ScaleBackbone, tokenizer: QuantizerAlone, settings: Mapping[str, Any]) -> Run:
    """Sample as ``autoregressive_infer_cfg`` does.

    Args:
        model: the network.
        tokenizer: of the same codes and scales.
        settings: ``B``, ``label_B``, ``g_seed``, ``cfg``, ``top_k``, ``top_p`` and, where pictures
            are smoothed, ``more_smooth``, as the official function takes them.
    """
    view = ScaleGuidance(1.0 + settings["cfg"]).wrap(Objective().view(model, tokenizer))
    sampler = NextScale(len(model.scales))
    generator = torch.Generator("cpu").manual_seed(settings["g_seed"] or 0)
    cond = conditions(_labels(settings, model, generator), model)
    state = sampler.start(view, cond, torch.arange(len(cond)))
    every = []
    for k, (height, width) in enumerate(model.scales):
        state = sampler.evaluate(view, state)
        logits = state.history["logits"][:, : height * width]
        every.append(logits)
        filtered = filter_logits(logits, settings["top_k"], settings["top_p"])
        odds = filtered.softmax(dim=-1).flatten(0, 1)
        drawn = torch.multinomial(odds, 1, replacement=True, generator=generator)
        codes = None
        if settings.get("more_smooth"):
            gumbel = -torch.empty_like(filtered).exponential_(generator=generator).log()
            weights = smooth_weights(filtered, gumbel, k / (len(model.scales) - 1))
            codes = weights @ tokenizer.quantizer.embedding.weight
        state = sampler.commit(view, state, drawn.view(len(cond), -1), codes)
    return Run(state.history["tokens"], every, sampler.finish(state))


def _labels(
    settings: Mapping[str, Any], model: ScaleBackbone, generator: torch.Generator
) -> Tensor:
    """Return the labels that the official function takes: given, one for all, or drawn."""
    given = settings["label_B"]
    if given is None:
        count = model.config["num_classes"]
        odds = torch.full((count,), 1.0 / count)
        return torch.multinomial(odds, settings["B"], replacement=True, generator=generator)
    return torch.full((settings["B"],), given) if isinstance(given, int) else torch.tensor(given)


def conditions(labels: Tensor, model: ScaleBackbone) -> Conditioning:
    """Return official labels, whose null class is the number of classes or below 0, as ours."""
    null = (labels == model.config["num_classes"]) | (labels < 0)
    return Conditioning(labels=labels.masked_fill(null, NULL_LABEL))


def whole_features(known: Tensor, model: ScaleBackbone) -> Tensor:
    """Put zeros for the first scale's tokens before the official input ``(B, L - l_0, Cv)``."""
    height, width = model.scales[0]
    return torch.cat((known.new_zeros(len(known), height * width, known.shape[2]), known), dim=1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return all gradients by name, zeros where none flowed."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
