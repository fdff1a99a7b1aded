"""A search with everything it needs beside the sampler, as the pipeline takes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.base import Backbone, ScaleBackbone
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.guidance.base import Guidance
from genscale.rewards.base import Request, Reward
from genscale.samplers.base import Sampler
from genscale.search.base import Search, SearchResult
from genscale.search.budget import Budget
from genscale.search.cost import INTENSITY, Work, step_costs
from genscale.search.engine import Engine
from genscale.search.scorer import Decode, Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSetup:
    """What to search for, how, and at what price.

    Args:
        search: the algorithm.
        reward: what it follows.
        held_out: what is scored on the returned pictures alone, by name.
        budget: the most to spend a returned sample.
        micro_batch: particles in one network call.
        watch: called after every micro-batch.
    """

    search: Search
    reward: Reward
    held_out: Mapping[str, Reward] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    micro_batch: int = 64
    watch: Callable[[Engine], None] | None = None

    @property
    def label(self) -> str:
        """What protocols call it."""
        limits = [
            f"{name} {value:g}"
            for name in ("nfe", "reward_calls", "seconds")
            if (value := getattr(self.budget, name)) is not None
        ]
        words = [self.search.label, f"reward {self.reward.label}"]
        return ", ".join([*words, *([f"budget {' '.join(limits)}"] if limits else [])])

    def problems(
        self, sampler: Sampler, requests: Sequence[Request] = (), *, clips: bool = False
    ) -> list[str]:
        """Return a sentence for everything that does not fit or is missing.

        Args:
            sampler: how trajectories advance.
            requests: what will be asked for, as far as it is known.
            clips: whether samples are clips.
        """
        found = self.search.problems(sampler, self.reward)
        for reward in (self.reward, *self.held_out.values()):
            found += _unseen(reward, clips) or reward.check() or reward.problems(requests)
        return found

    def run(
        self,
        sampler: Sampler,
        view: Any,
        guidance: Guidance,
        decode: Decode,
        cond: Conditioning,
        seeds: Tensor,
        *,
        requests: Sequence[Request],
        work: Work | None = None,
    ) -> SearchResult:
        """Search for the best sample of each of G prompts.

        Args:
            sampler: how trajectories advance.
            view: the model's, without guidance.
            guidance: what wraps it.
            decode: latents to pictures.
            cond: conditions of G prompts.
            seeds: ``(G,)`` int64 of their plain samples.
            requests: G of them.
            work: operations of every step, for costs beyond counts.

        Raises:
            ConfigError: parts that do not fit, or a budget smaller than one sample.
        """
        problems = self.problems(sampler, requests, clips=len(view.sample_shape) == 4)
        if problems:
            raise ConfigError("\n".join(problems))
        for reward in (self.reward, *self.held_out.values()):
            reward.to(view.device)
        engine = Engine(
            sampler,
            guidance.wrap(view),
            cond.to(view.device),
            seeds,
            Scorer(decode, self.reward, self.held_out),
            self.budget,
            requests=requests,
            costs=step_costs(sampler, view, cond, guidance),
            work=work,
            micro_batch=self.micro_batch,
            watch=self.watch,
        )
        return self.search.run(engine)


def _unseen(reward: Reward, clips: bool) -> list[str]:
    """Return a sentence where a reward judges another kind of samples."""
    if reward.clips == clips:
        return []
    if clips:
        return [
            f"reward {reward.label} judges pictures, but the model makes clips. Give "
            "reward_frames=mean, and it judges every frame, or choose a reward for clips."
        ]
    return [
        f"reward {reward.label} judges clips, but the model makes pictures. "
        "Choose another reward=..."
    ]


def requests_of(captions: Sequence[str] | None, labels: Tensor | None, count: int) -> list[Request]:
    """Return what was asked of each of ``count`` samples."""
    return [
        Request(
            caption=None if captions is None else captions[i],
            label=None if labels is None else int(labels[i]),
        )
        for i in range(count)
    ]


def work_of(
    model: Backbone,
    sampler: Sampler,
    *,
    precision: str = "float32",
    shape: tuple[int, ...] | None = None,
) -> Work:
    """Return the operations and tokens of every step of a sampler.

    Of scale-wise models each scale has its share of the whole pass by its tokens; attention, whose
    cost grows within the pass, is spread alike.

    Args:
        model: the network.
        sampler: whose steps.
        precision: dtype in which the network computes, ``float32`` or ``bfloat16``.
        shape: of one sample; default is the network's ``sample_shape``.
    """
    shape = shape or model.sample_shape
    if isinstance(model, ScaleBackbone):
        model = model.at_size(*shape[1:])
    whole = float(model.flops(shape))
    if isinstance(model, ScaleBackbone):
        tokens = torch.tensor([float(h * w) for h, w in model.scales], dtype=torch.float64)
        flops = whole * tokens / tokens.sum()
    else:
        _, *sides = shape
        patch = model.config.get("patch_size") or 1
        patches = [patch] * len(sides) if isinstance(patch, int) else list(patch)
        if len(patches) != len(sides):
            patches = [1] * len(sides)
        cells = math.prod(side / each for side, each in zip(sides, patches, strict=True))
        tokens = torch.full((sampler.num_steps,), cells, dtype=torch.float64)
        flops = torch.full_like(tokens, whole)
    weights = float(sum(parameter.numel() for parameter in model.parameters()))
    size = 4 if precision == "float32" else 2
    return Work(flops, tokens, weights * size, _intensity(model))


def _intensity(model: Backbone) -> float:
    device = next(model.parameters()).device
    if device.type != "cuda":
        return INTENSITY["cpu"]
    name = torch.cuda.get_device_name(device).lower()
    return next((value for key, value in INTENSITY.items() if key in name), INTENSITY["a100"])
