"""What a search spends: counted exactly, told beforehand, and put into one currency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.guidance.base import Guidance, Unguided
from genscale.objectives.base import (
    Denoiser,
    Level,
    Prediction,
    ScaleDecoder,
    ScalePrediction,
)
from genscale.samplers.base import Sampler, State

# evaluations that a backward pass through the network is worth: two products for each of its own
BACKWARD = 2.0
# peak dense bf16 operations over bytes of memory traffic, from the makers' data sheets
INTENSITY = {"h100": 295.0, "h200": 206.0, "a100": 153.0, "cpu": 20.0}


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Network evaluations of every step of a trajectory, guidance branches counted.

    Attributes:
        evaluate: ``(S,)`` float64, of ``evaluate`` at step i.
        advance: ``(S,)`` float64, of ``advance`` on top of it.
    """

    evaluate: Tensor
    advance: Tensor

    def __len__(self) -> int:
        return len(self.evaluate)

    @property
    def total(self) -> float:
        """Evaluations of one plain sample."""
        return float((self.evaluate + self.advance).sum())

    def between(self, start: int, stop: int) -> float:
        """Evaluations from step ``start`` to step ``stop``."""
        return float((self.evaluate + self.advance)[start:stop].sum())


def step_costs(
    sampler: Sampler, view: Any, cond: Conditioning, guidance: Guidance | None = None
) -> StepCosts:
    """Return what each step of one trajectory costs, by walking it without the network.

    A stand-in answers zeros in the network's place, so that guidance and sampler count what they
    would spend. Where evaluations depend on the sample, the sampler's own bound is spread evenly.

    Args:
        sampler: whose steps.
        view: the unguided view.
        cond: conditions of at least one sample (no fields at all for an unconditional model).
        guidance: wraps the stand-in; None guides nothing.
    """
    guided = (guidance or Unguided()).wrap(_stand_in(view))
    first = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        state = sampler.start(guided, cond.select(first) if len(cond) else cond, first)
        spent: list[tuple[float, float]] = []
        for _ in range(sampler.num_steps):
            before = float(state.nfe[0])
            state = sampler.evaluate(guided, state)
            middle = float(state.nfe[0])
            state = sampler.advance(guided, state)
            spent.append((middle - before, float(state.nfe[0]) - middle))
    evaluate, advance = torch.tensor(spent, dtype=torch.float64).unbind(1)
    if sampler.nfe_is_bound:
        branches = max(1.0, float(evaluate.max()))
        most = branches * sampler.nfe(0, sampler.num_steps) / sampler.num_steps
        advance = torch.full_like(evaluate, most) - evaluate
    return StepCosts(evaluate, advance)


def _stand_in(view: Any) -> Any:
    return _ZeroScales(view) if isinstance(view, ScaleDecoder) else _ZeroDenoiser(view)


class _ZeroDenoiser(Denoiser):
    """Answers zeros, at the price of one evaluation a row."""

    def __init__(self, view: Denoiser) -> None:
        self.process, self.device = view.process, torch.device("cpu")
        self.sample_shape = tuple(1 for _ in view.sample_shape)

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        cost = torch.ones(len(x), dtype=torch.float64)
        return Prediction(torch.zeros_like(x), torch.zeros_like(x), None, cost)


class _ZeroScales(ScaleDecoder):
    """Answers even logits, at the price of one evaluation a row."""

    def __init__(self, view: ScaleDecoder) -> None:
        self.tokenizer, self.scales = view.tokenizer, view.scales
        self.vocab_size, self.needs_prefix = view.vocab_size, view.needs_prefix
        self.sample_shape, self.device = view.sample_shape, view.device

    def begin(self, cond: Conditioning, batch: int) -> Any:
        return {}

    def __call__(
        self, features: Tensor, scale: int, cond: Conditioning, memory: Any = None
    ) -> ScalePrediction:
        height, width = self.scales[scale]
        logits = torch.zeros(len(features), height * width, self.vocab_size, device=self.device)
        return ScalePrediction(logits, {}, torch.ones(len(features), dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class Work:
    """What one network evaluation of one sample is, step by step; for costs beyond counts.

    Attributes:
        flops: ``(S,)`` float64 operations.
        tokens: ``(S,)`` float64 tokens that pass through the network.
        weight_bytes: read once a call, whatever the batch.
        intensity: operations that the device does while it moves one byte.
    """

    flops: Tensor
    tokens: Tensor
    weight_bytes: float = 0.0
    intensity: float = INTENSITY["cpu"]


@dataclass(slots=True)
class CostMeter:
    """Everything spent so far; one row a prompt, so that each knows its own.

    Attributes:
        nfe: ``(G,)`` float64 network evaluations, guidance branches counted.
        tokens: ``(G,)`` tokens that passed through the network.
        flops: ``(G,)`` operations of the network.
        eflops: ``(G,)`` operations and memory traffic in one currency (arXiv:2506.05333): a call
            with B rows costs B F + I (W + B A), with F operations and A bytes of state a row, W
            bytes of weights and I the device's intensity. The call's W is shared by its rows.
        decodes: ``(G,)`` latents made pictures.
        reward_calls: ``(G,)`` pictures judged.
        held_out_calls: ``(G,)`` pictures judged by held-out rewards.
        backward_calls: ``(G,)`` backward passes through the network, a particle each.
        seconds: wall-clock, by kind: ``network``, ``decode``, ``reward``.
    """

    count: int
    nfe: Tensor = field(init=False)
    tokens: Tensor = field(init=False)
    flops: Tensor = field(init=False)
    eflops: Tensor = field(init=False)
    decodes: Tensor = field(init=False)
    reward_calls: Tensor = field(init=False)
    held_out_calls: Tensor = field(init=False)
    backward_calls: Tensor = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in COUNTS:
            setattr(self, name, torch.zeros(self.count, dtype=torch.float64))

    def add(self, name: str, group: Tensor, amount: Tensor | float = 1.0) -> None:
        """Add an amount a particle ``(n,)`` to the counter ``name`` of each one's prompt."""
        amounts = torch.as_tensor(amount, dtype=torch.float64).expand(len(group))
        getattr(self, name).index_add_(0, group, amounts)

    def add_seconds(self, kind: str, seconds: float) -> None:
        """Add wall-clock time of one kind of work."""
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def row(self, prompt: int) -> dict[str, float]:
        """Return what one prompt has spent."""
        return {name: float(getattr(self, name)[prompt]) for name in COUNTS}

    def record(self) -> dict[str, float]:
        """Return means a prompt, and seconds of the whole, for reports and json files."""
        means = {name: float(getattr(self, name).mean()) for name in COUNTS}
        return {**means, **{f"seconds_{kind}": value for kind, value in self.seconds.items()}}

    @staticmethod
    def cat(meters: Sequence[CostMeter]) -> CostMeter:
        """Join the meters of several batches of prompts."""
        joined = CostMeter(sum(meter.count for meter in meters))
        for name in COUNTS:
            setattr(joined, name, torch.cat([getattr(meter, name) for meter in meters]))
        for meter in meters:
            for kind, value in meter.seconds.items():
                joined.add_seconds(kind, value)
        return joined


COUNTS = (
    *("nfe", "tokens", "flops", "eflops", "decodes"),
    *("reward_calls", "held_out_calls", "backward_calls"),
)


def state_bytes(state: State) -> float:
    """Return the bytes of everything that follows one particle: x, history, memory, conditions."""
    held = (state.x, state.clean, state.noise, state.history, state.memory, state.pending)
    return sum(_bytes(part) for part in held) / max(1, len(state))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes(part) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(part) for part in value)
    return 0
