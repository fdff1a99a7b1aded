"""The contract of a sampler: a trajectory that can be looked at, selected, branched, resumed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Family
from genscale.objectives.memory import cat_tensors, put_rows, take_rows
from genscale.objectives.schedule import NoiseProcess
from genscale.rng import Purpose


@dataclass(frozen=True, slots=True)
class State:
    """Where a set of particles stands; everything that must follow a particle is in it.

    Bookkeeping (``step``, ``seeds``, ``lineage``, ``group``, ``nfe``) lives on the CPU, so that
    control flow never waits for a device.

    Attributes:
        x: ``(B, ...)`` noisy samples; of scale-wise models the running latents.
        cond: conditions, batch axis B.
        step: ``(B,)`` int64 steps already taken, a particle each.
        seeds: ``(B,)`` int64 sample seeds.
        lineage: ``(B,)`` int64; copies of one particle differ in it, so their later noise does.
        group: ``(B,)`` int64: which prompt a particle belongs to.
        nfe: ``(B,)`` float64 network evaluations spent so far.
        clean: estimate of x_0 at the current step, set by ``evaluate``; None before. Of scale-wise
            models the running latent after a provisional draw.
        noise: estimate of eps, set with ``clean``.
        variance: what a network with learned variance says of it, set with ``clean``.
        history: solver history by name, tensors with a leading particle axis; tokens and logits
            of scale-wise models.
        memory: what the denoiser handed back (nested tensors with a leading particle axis).
        pending: memory after the current step's evaluation, committed by ``advance``; the object
            ``memory`` itself where the network wrote into that.
        process: the noising process a diffusion trajectory reverses, the same for all particles.
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
    process: NoiseProcess | None = None
    variance: Tensor | None = None

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

        memory = take_rows(self.memory, index)
        # where a network writes into its memory in place, both are one: rows are copied once
        one = self.pending is self.memory
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
            history=take_rows(self.history, index),
            memory=memory,
            pending=memory if one else take_rows(self.pending, index),
            process=self.process,
            variance=None if self.variance is None else pick(self.variance),
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
        if len({state.process for state in states}) > 1:
            raise ValueError(
                "Cannot join states of trajectories under different noising processes. "
                "Join states that were started with the same model."
            )
        done = not evaluated.pop()
        counts = [len(state) for state in states]
        memory = cat_tensors([state.memory for state in states], counts)
        one = all(state.pending is state.memory for state in states)
        return State(
            x=torch.cat([state.x for state in states]),
            cond=Conditioning.cat([state.cond for state in states]),
            step=torch.cat([state.step for state in states]),
            seeds=torch.cat([state.seeds for state in states]),
            lineage=torch.cat([state.lineage for state in states]),
            group=torch.cat([state.group for state in states]),
            nfe=torch.cat([state.nfe for state in states]),
            clean=torch.cat([s.clean for s in states if s.clean is not None]) if done else None,
            noise=cat_tensors([state.noise for state in states]),
            history=cat_tensors([state.history for state in states]),
            memory=memory,
            pending=memory if one else cat_tensors([state.pending for state in states], counts),
            process=states[0].process,
            variance=cat_tensors([state.variance for state in states]),
        )

    def put(self, index: Tensor, part: State) -> State:
        """Return a copy in which particles ``index`` have moved on as in ``part``, row by row.

        Conditions, seeds and groups stay: ``part`` holds the same particles. Both states are
        evaluated or neither is.
        """
        fields = ("x", "step", "lineage", "nfe", "clean", "noise", "variance", "history", "memory")
        count = len(self)
        moved = {
            name: put_rows(getattr(self, name), index, getattr(part, name), count)
            for name in fields
        }
        if self.pending is self.memory and part.pending is part.memory:
            moved["pending"] = moved["memory"]
        else:
            moved["pending"] = put_rows(self.pending, index, part.pending, count)
        return replace(self, **moved)

    def replace(self, **changes: Any) -> State:
        """Return a copy with some fields changed."""
        return replace(self, **changes)


class Sampler(ABC):
    """Advances states; holds settings only, so one object serves any number of trajectories.

    Views are a :class:`~genscale.objectives.base.Denoiser` or a
    :class:`~genscale.objectives.base.ScaleDecoder`, as the family is.

    Attributes:
        family: of objectives whose views it advances.
        nfe_is_bound: :meth:`nfe` is an upper bound, because evaluations depend on the sample.
    """

    family: ClassVar[Family] = "diffusion"
    nfe_is_bound: ClassVar[bool] = False

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise, so that copies of a particle with other lineages part."""
        return False

    @property
    def label(self) -> str:
        """What protocols call it: everything that its steps do not say."""
        return type(self).__name__

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Number of ``advance`` calls from start to finish."""

    @abstractmethod
    def nfe(self, i: int, j: int) -> int:
        """Network evaluations from step i to step j, one branch a call.

        In closed form; the most there can be where ``nfe_is_bound``.
        """

    def check(self, process: NoiseProcess, *, learned_variance: bool) -> list[str]:
        """Return a sentence for everything that would fail on the way; asked before sampling.

        Args:
            process: that of the model's objective.
            learned_variance: whether the network predicts its variance.
        """
        return []

    def noise_shape(self, model: Any) -> tuple[int, ...]:
        """Return the shape of the unit noise of one sample that :meth:`start` takes."""
        shape: tuple[int, ...] = model.sample_shape
        return shape

    def start_noise(self, model: Any, seeds: Tensor) -> Tensor:
        """Return the unit noise ``(B, ...)`` that trajectories of these seeds draw themselves.

        Given to :meth:`start` with the same seeds, it changes nothing.
        """
        keys = rng.key(seeds, Purpose.INIT).to(model.device, non_blocking=True)
        return rng.normal(keys, self.noise_shape(model))

    def step_noise(self, model: Any, state: State) -> Tensor:
        """Return the unit noise ``(B, ...)`` that the current step draws itself.

        Given to :meth:`advance`, it changes nothing, save where copies of an evaluated particle
        have a lineage of their own: scale-wise models then draw again, by that lineage.
        """
        keys = rng.key(state.seeds, state.lineage, state.step, Purpose.STEP)
        keys = keys.to(state.x.device, non_blocking=True)
        return rng.normal(keys, tuple(state.x.shape[1:])).to(state.x.dtype)

    @abstractmethod
    def start(
        self,
        model: Any,
        cond: Conditioning,
        seeds: Tensor,
        noise: Tensor | None = None,
    ) -> State:
        """Begin from unit-normal ``noise`` ``(B, ...)``; None draws it from the seeds."""

    @abstractmethod
    def evaluate(self, model: Any, state: State) -> State:
        """Set ``.clean`` and ``.noise`` of the current step; idempotent, commits nothing."""

    @abstractmethod
    def advance(self, model: Any, state: State, noise: Tensor | None = None) -> State:
        """Take one step (evaluating first if need be); ``noise`` replaces the keyed draw."""

    @abstractmethod
    def finish(self, state: State) -> Tensor:
        """Return the samples of a state that has taken all its steps."""

    def steps(self, model: Any, state: State) -> Iterator[State]:
        """Yield the evaluated state of every remaining step, then the finished state."""
        while int(state.step.min()) < self.num_steps:
            state = self.evaluate(model, state)
            yield state
            state = self.advance(model, state)
        yield state

    def run(
        self,
        model: Any,
        cond: Conditioning,
        seeds: Tensor,
        noise: Tensor | None = None,
    ) -> State:
        """Sample from start to end; the result's ``.x`` holds the samples."""
        return self.complete(model, self.start(model, cond, seeds, noise))

    def complete(self, model: Any, state: State) -> State:
        """Advance all particles to the end."""
        while int(state.step.min()) < self.num_steps:
            state = self.advance(model, state)
        return state
