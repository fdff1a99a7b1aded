"""Tiny models of every family, untrained but not silent, for searches to run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from genscale.autoencoders.msvq import MSVQ
from genscale.backbones.causal_video import CausalVideo
from genscale.backbones.dimr import DiMR
from genscale.backbones.dit import DiT
from genscale.backbones.mvar import MVAR
from genscale.backbones.switti import Switti
from genscale.backbones.var import VAR
from genscale.conditioning.base import Conditioning
from genscale.guidance.base import Guidance, Unguided
from genscale.guidance.cfg import ClassifierFree
from genscale.guidance.scale_wise import ScaleGuidance
from genscale.objectives.ddpm import DDPM
from genscale.objectives.diffusion_forcing import DiffusionForcing
from genscale.objectives.flow import FlowMatching
from genscale.objectives.next_scale import NextScale as Tokens
from genscale.samplers.base import Sampler
from genscale.samplers.blocks import Blocks
from genscale.samplers.next_scale import NextScale
from genscale.samplers.ode import Euler
from genscale.samplers.sde import DDIM
from genscale.search.budget import Budget
from genscale.search.cost import StepCosts, step_costs
from genscale.search.engine import Engine
from genscale.search.scorer import Scorer
from tests.search.conftest import Brightness

SCALES = [1, 2, 3, 4]
PROMPTS = 3


@dataclass(frozen=True)
class World:
    """A model with its usual sampler, guided, and what it decodes with."""

    sampler: Sampler
    model: Any
    cond: Conditioning
    costs: StepCosts
    decode: Callable[[Tensor], Tensor]

    def engine(
        self,
        *,
        prompts: slice = slice(None),
        sampler: Sampler | None = None,
        reward: Any = None,
        budget: Budget | None = None,
        micro_batch: int = 64,
    ) -> Engine:
        rows = torch.arange(PROMPTS)[prompts]
        costs = None if sampler is not None else self.costs
        return Engine(
            sampler or self.sampler,
            self.model,
            self.cond.select(rows),
            rows + 100,
            Scorer(self.decode, reward or Brightness()),
            budget,
            costs=costs,
            micro_batch=micro_batch,
        )


def _awake(network: nn.Module) -> nn.Module:
    """Fresh networks say the same of everything: gates and heads start at zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


@cache
def tokenizer() -> MSVQ:
    torch.manual_seed(3)
    return MSVQ(
        scales=SCALES, vocab_size=24, latent_channels=6, image_channels=1, hidden_size=8,
        channel_multipliers=(1, 2), num_blocks=1, norm_groups=4,
    ).eval().requires_grad_(False)  # fmt: skip


def _labels() -> Conditioning:
    return Conditioning(labels=torch.arange(PROMPTS))


def _captions() -> Conditioning:
    generator = torch.Generator().manual_seed(1)
    return Conditioning(
        text=torch.randn(PROMPTS, 4, 12, generator=generator),
        text_mask=torch.arange(4)[None] < torch.tensor([4, 2, 3])[:, None],
        pooled_text=torch.randn(PROMPTS, 10, generator=generator),
    )


def _diffusion(network: nn.Module, objective: Any, sampler: Sampler, guidance: Guidance) -> World:
    view, cond = objective.view(_awake(network)), _labels()
    costs = step_costs(sampler, view, cond, guidance)
    return World(sampler, guidance.wrap(view), cond, costs, lambda latents: latents.tanh())


def _scale_wise(network: nn.Module, cond: Conditioning) -> World:
    guidance, sampler = ScaleGuidance(2.0, stop=3), NextScale(len(SCALES))
    view = Tokens().view(_awake(network), tokenizer())
    costs = step_costs(sampler, view, cond, guidance)
    return World(
        sampler, guidance.wrap(view), cond, costs, lambda x: (10 * tokenizer().decode(x)).tanh()
    )


_TOKENS: dict[str, Any] = {
    "scales": SCALES, "latent_channels": 6, "vocab_size": 24, "hidden_size": 32, "depth": 2,
    "num_heads": 2,
}  # fmt: skip
_TEXT = {"text_size": 12, "num_text_tokens": 4, "pooled_text_size": 10, "crop_condition": False}


def _dimr(sampler: Sampler) -> World:
    network = DiMR(
        input_size=8, in_channels=1, num_classes=5, hidden_sizes=[16, 8], depths=[1, 1],
        patch_sizes=[4, 2], num_heads=2, kernel_sizes=3,
    )  # fmt: skip
    return _diffusion(network, FlowMatching(), sampler, Unguided())


def _dit(sampler: Sampler) -> World:
    network = DiT(
        input_size=8, in_channels=1, num_classes=5, patch_size=4, hidden_size=16, depth=1,
        num_heads=2,
    )  # fmt: skip
    return _diffusion(network, DDPM(), sampler, ClassifierFree(1.5))


def _video(sampler: Sampler) -> World:
    network = CausalVideo(
        input_size=[4, 4, 4], in_channels=1, num_classes=5, patch_size=2, hidden_size=24, depth=1,
        num_heads=2, mlp_size=24, frequency_size=8, block_size=2,
    )  # fmt: skip
    return _diffusion(network, DiffusionForcing(), sampler, ClassifierFree(1.5))


FAMILIES: dict[str, Callable[[], World]] = {
    "dimr-flow": lambda: _dimr(Euler(4)),
    "dit-ddpm": lambda: _dit(DDIM(4, eta=1.0)),
    "var": lambda: _scale_wise(VAR(**_TOKENS, num_classes=5), _labels()),
    "switti": lambda: _scale_wise(Switti(**_TOKENS, **_TEXT), _captions()),
    "switti-ar": lambda: _scale_wise(Switti(**_TOKENS, **_TEXT, use_ar=True), _captions()),
    "causal-video": lambda: _video(Blocks(2, eta=1.0, block_size=2, trained_frames=4)),
    "mvar": lambda: _scale_wise(MVAR(**_TOKENS, num_classes=5), _labels()),
}


@cache
def world(family: str) -> World:
    """Return a family's model, made once."""
    torch.manual_seed(0)
    return FAMILIES[family]()
