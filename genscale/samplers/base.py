"""The contract of a sampler: a trajectory that can be looked at, selected, branched, resumed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Denoiser


def _map_tensors(value: Any, function: Any) -> Any:
    """Apply ``function`` to every tensor of a nested memory (dicts, lists, tuples)."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _map_tensors(item, function) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    return value


def _cat_tensors(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, dict):
        return {name: _cat_tensors([value[name] for value in values]) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(_cat_tensors(list(items)) for items in zip(*values, strict=True))
    return first


@dataclass(frozen=True, slots=True)
class State:
    """Where a set of particles stands; everything that must follow a particle is in it.

    Bookkeeping (``step``, ``seeds``, ``lineage``, ``group``, ``nfe``) lives on the CPU, so that
    control flow never waits for a device.

    Attributes:
        x: ``(B, ...)`` noisy samples.
        cond: conditions, batch axis B.
        step: ``(B,)`` int64 steps already taken, a particle each.
        seeds: ``(B,)`` int64 sample seeds.
        lineage: ``(B,)`` int64; copies of one particle differ in it, so their later noise does.
        group: ``(B,)`` int64: which prompt a particle belongs to.
        nfe: ``(B,)`` float64 network evaluations spent so far.
        clean: estimate of x_0 at the current step, set by ``evaluate``; None before.
        noise: estimate of eps, set with ``clean``.
        history: solver history by name, tensors with a leading particle axis.
        memory: what the denoiser handed back (nested tensors with a leading particle axis).
        pending: memory after the current step's evaluation, committed by ``advance``.
    """

    x: Tensor
    cond: Conditioning
    step: Tensor
    seeds: Tensor
    lineage: Tensor
    group: Tensor
    nfe: Tensor
    clean: Tensor | None = None
    noise: Tensor | None = None
    history: dict[str, Tensor] = field(default_factory=dict)
    memory: Any = None
    pending: Any = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shared_step(self) -> int | None:
        """The step all particles stand at, or None when they differ."""
        first = int(self.step[0])
        return first if bool((self.step == first).all()) else None

    def select(self, index: Tensor) -> State:
        """Take particles ``index`` (int64 on the CPU; repeats make copies)."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)]

        return State(
            x=pick(self.x),
            cond=self.cond.select(index),
            step=pick(self.step),
            seeds=pick(self.seeds),
            lineage=pick(self.lineage),
            group=pick(self.group),
            nfe=pick(self.nfe),
            clean=None if self.clean is None else pick(self.clean),
            noise=None if self.noise is None else pick(self.noise),
            history=_map_tensors(self.history, pick),
            memory=_map_tensors(self.memory, pick),
            pending=_map_tensors(self.pending, pick),
        )

    @staticmethod
    def cat(states: list[State]) -> State:
        """Join particles of several states that hold the same fields."""
        evaluated = {state.clean is None for state in states}
        if len(evaluated) > 1:
            raise ValueError(
                "Cannot join states of which some are evaluated and some are not. "
                "Call sampler.evaluate on all of them, or on none."
            )
        done = not evaluated.pop()
        return State(
            x=torch.cat([state.x for state in states]),
            cond=Conditioning.cat([state.cond for state in states]),
            step=torch.cat([state.step for state in states]),
            seeds=torch.cat([state.seeds for state in states]),
            lineage=torch.cat([state.lineage for state in states]),
            group=torch.cat([state.group for state in states]),
            nfe=torch.cat([state.nfe for state in states]),
            clean=torch.cat([s.clean for s in states if s.clean is not None]) if done else None,
            noise=torch.cat([s.noise for s in states if s.noise is not None]) if done else None,
            history=_cat_tensors([state.history for state in states]),
            memory=_cat_tensors([state.memory for state in states]),
            pending=_cat_tensors([state.pending for state in states]),
        )

    def replace(self, **changes: Any) -> State:
        """Return a copy with some fields changed."""
        return replace(self, **changes)


class Sampler(ABC):
    """Advances states; holds settings only, so one object serves any number of trajectories."""

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Number of ``advance`` calls from start to finish."""

    @abstractmethod
    def nfe(self, i: int, j: int) -> int:
        """Network evaluations from step i to step j, one branch a call (closed form)."""

    @abstractmethod
    def start(
        self,
        model: Denoiser,
        cond: Conditioning,
        seeds: Tensor,
        noise: Tensor | None = None,
    ) -> State:
        """Begin from unit-normal ``noise`` ``(B, ...)``; None draws it from the seeds."""

    @abstractmethod
    def evaluate(self, model: Denoiser, state: State) -> State:
        """Set ``.clean`` and ``.noise`` of the current step; idempotent, commits nothing."""

    @abstractmethod
    def advance(self, model: Denoiser, state: State, noise: Tensor | None = None) -> State:
        """Take one step (evaluating first if need be); ``noise`` replaces the keyed draw."""

    @abstractmethod
    def finish(self, state: State) -> Tensor:
        """Return the samples of a state that has taken all its steps."""

    def steps(self, model: Denoiser, state: State) -> Iterator[State]:
        """Yield the evaluated state of every remaining step, then the finished state."""
        while int(state.step.min()) < self.num_steps:
            state = self.evaluate(model, state)
            yield state
            state = self.advance(model, state)
        yield state

    def run(
        self,
        model: Denoiser,
        cond: Conditioning,
        seeds: Tensor,
        noise: Tensor | None = None,
    ) -> State:
        """Sample from start to end; the result's ``.x`` holds the samples."""
        state = self.start(model, cond, seeds, noise)
        while int(state.step.min()) < self.num_steps:
            state = self.advance(model, state)
        return state
