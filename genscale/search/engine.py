"""What every search is written against: particles of many prompts, moved, judged and counted.

A search holds one :class:`~genscale.samplers.base.State` of all particles of all prompts. The
engine moves it in micro-batches, so that activations take memory for one micro-batch only, counts
what that costs each prompt, and refuses what the budget does not allow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.rewards.base import Request
from genscale.rng import Purpose
from genscale.samplers.base import Sampler, State
from genscale.search.answers import Answers, Found
from genscale.search.budget import Budget
from genscale.search.cost import StepCosts, Work, state_bytes, step_costs
from genscale.search.genealogy import Genealogy, Generation
from genscale.search.ledger import Ledger
from genscale.search.scorer import Scorer, Scores

_Result = TypeVar("_Result")


class Engine(Ledger):
    """One search under way.

    Args:
        sampler: how trajectories advance.
        model: the view that it advances, guided.
        cond: conditions of G prompts.
        seeds: ``(G,)`` int64 seeds of the prompts' plain samples.
        scorer: decoder and rewards.
        budget: the most to spend.
        requests: what was asked, a prompt each, for the rewards; None: nothing but pictures.
        costs: of every step; None finds them for a model without guidance.
        work: operations of every step; None counts evaluations alone.
        micro_batch: particles in one network call or one decode.
        top: finished samples to keep a prompt.
        watch: called after every micro-batch with this engine, to show progress.

    Attributes:
        num_prompts: G.
        costs: network evaluations of every step.
        meter: what was spent.
        genealogy: who descends from whom, as far as the search tells.
        state_bytes: of one particle, the most seen.
    """

    def __init__(
        self,
        sampler: Sampler,
        model: Any,
        cond: Conditioning,
        seeds: Tensor,
        scorer: Scorer,
        budget: Budget | None = None,
        *,
        requests: Sequence[Request] | None = None,
        costs: StepCosts | None = None,
        work: Work | None = None,
        micro_batch: int = 64,
        top: int = 1,
        watch: Callable[[Engine], None] | None = None,
    ) -> None:
        costs = costs or step_costs(sampler, model, cond)
        super().__init__(len(seeds), budget or Budget(), costs, work)
        self.sampler = sampler
        self.model = model
        self.cond = cond
        self.seeds = seeds.to(device="cpu", dtype=torch.int64)
        self.scorer = scorer
        self.micro_batch = micro_batch
        self.top = top
        self.genealogy = Genealogy()
        self.state_bytes = 0.0
        self._watch = watch
        self._answers = Answers(self.num_prompts, top, scorer)
        scorer.prepare(list(requests or [Request()] * self.num_prompts))

    # ------------------------------------------------------------------ particles

    def particle_seeds(self, count: int, first: int = 0) -> Tensor:
        """Return the seeds of particles ``first`` to ``first + count`` of every prompt.

        Particle 0 has the prompt's own seed: it is the plain sample.

        Returns:
            ``(G * count,)`` int64, prompt by prompt.
        """
        numbers = torch.arange(first, first + count)
        keys = rng.key(self.seeds[:, None], numbers[None], Purpose.PARTICLE)
        return torch.where(numbers == 0, self.seeds[:, None], keys).flatten()

    def start(
        self,
        count: int,
        *,
        first: int = 0,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> State:
        """Begin ``count`` particles of every prompt.

        Args:
            count: particles a prompt, N.
            first: number of the first one.
            noise: ``(G * N, ...)`` unit normal, of :meth:`noise_shape`; None draws it from the
                seeds.
            seeds: ``(G * N,)`` in place of those of :meth:`particle_seeds`.

        Returns:
            ``G * N`` particles, prompt by prompt.
        """
        group = torch.arange(self.num_prompts).repeat_interleave(count)
        chosen = self.particle_seeds(count, first) if seeds is None else seeds
        cond = self.cond.select(group) if len(self.cond) else self.cond
        # what a scale-wise network computes once a sample is its work as any other
        with torch.no_grad(), self._timed("network"):
            state = self.sampler.start(self.model, cond, chosen, noise)
        return state.replace(group=group)

    def noise(self, seeds: Tensor) -> Tensor:
        """Return the unit noise ``(n, ...)`` that trajectories of these seeds draw themselves."""
        return self.sampler.start_noise(self.model, seeds)

    def branch(self, state: State, index: Tensor, copy: Tensor | None = None) -> State:
        """Take particles ``index``; copies of one part from here on.

        The first copy keeps its lineage, so that a particle chosen once goes on as it would have.

        Args:
            state: the particles.
            index: ``(n,)`` int64 on the CPU.
            copy: ``(n,)`` int64, which copy of its particle each is; None counts them.
        """
        chosen = state.select(index)
        copy = _occurrence(index) if copy is None else copy
        fresh = rng.key(chosen.lineage, chosen.step, copy, Purpose.BRANCH)
        return chosen.replace(lineage=torch.where(copy == 0, chosen.lineage, fresh))

    # ------------------------------------------------------------------ moves

    def evaluate(self, state: State) -> State:
        """Set ``.clean`` of all particles; nothing where that is done already."""
        if state.clean is not None:
            return state
        self._reserve(state, self.costs.evaluate)
        return self._move(state, lambda part, _: self.sampler.evaluate(self.model, part))

    def advance(self, state: State, noise: Tensor | None = None) -> State:
        """Take one step in all particles that have one left.

        Args:
            state: evaluated first if need be.
            noise: ``(n, ...)`` in place of the keyed draw.
        """
        state = self.evaluate(state)
        self._reserve(state, self.costs.advance)

        def step(part: State, rows: Tensor) -> State:
            own = None if noise is None else noise[rows.to(noise.device)]
            return self.sampler.advance(self.model, part, own)

        return self._move(state, step)

    def run(self, state: State, until: int | None = None) -> State:
        """Advance every particle to step ``until``, the end by default.

        Each micro-batch goes all the way before the next begins: only its memory is at work.

        Raises:
            ValueError: particles at different steps, where some would go past ``until``.
        """
        stop = self.sampler.num_steps if until is None else until
        if bool((state.step >= stop).all()):
            return state
        if stop < self.sampler.num_steps and state.shared_step is None:
            raise ValueError(
                f"Particles at steps {sorted(set(state.step.tolist()))} were to stop at step "
                f"{stop} together. Run those of one step at a time."
            )
        total = self.costs.evaluate + self.costs.advance
        done = torch.cat((torch.zeros(1, dtype=torch.float64), total.cumsum(0)))
        left = (done[stop] - done[state.step]).clamp(min=0.0)
        if state.clean is not None:
            left = left - self._of_step(self.costs.evaluate, state.step)
        self._check_nfe(state.group, left.clamp(min=0.0))

        def go(part: State, _: Tensor) -> State:
            while int(part.step.min()) < stop:
                part = self.sampler.advance(self.model, part)
            if stop == self.sampler.num_steps and self.sampler.family == "scale_wise":
                part = part.replace(memory=None)  # keys and values that nothing reads any more
            return part

        return self._move(state, go)

    def _move(self, state: State, move: Callable[[State, Tensor], State]) -> State:
        """Apply ``move`` to micro-batches and count what it cost."""
        moved = []
        for rows in self._split(len(state)):
            self._check_time()
            part = state if len(rows) == len(state) else state.select(rows)
            with torch.no_grad(), self._timed("network"):
                after = move(part, rows)
            self.count(part, after)
            moved.append(after)
            self._report()
        state = moved[0] if len(moved) == 1 else State.cat(moved)
        self.state_bytes = max(self.state_bytes, state_bytes(state))
        return state

    def each(self, count: int, kind: str, work: Callable[[Tensor], _Result]) -> list[_Result]:
        """Do a kind of work in micro-batches of ``count`` rows; the work counts what it spends.

        Raises:
            BudgetSpent: the time is over; asked before each micro-batch.
        """
        done = []
        for rows in self._split(count):
            self._check_time()
            with self._timed(kind):
                done.append(work(rows))
            self._report()
        return done

    # ------------------------------------------------------------------ judging

    def decode(self, latents: Tensor, group: Tensor) -> Tensor:
        """Return pictures or clips, in about [-1, 1]; each sample is counted as a decode."""
        images = []
        for rows in self._split(len(latents)):
            self._check_time()
            with torch.no_grad(), self._timed("decode"):
                images.append(self.scorer.decode(latents[rows.to(latents.device)]).float())
            self._report()
        self.meter.add("decodes", group)
        return torch.cat(images)

    def score(self, latents: Tensor, group: Tensor, images: Tensor | None = None) -> Scores:
        """Decode and judge latents ``(n, ...)`` of prompts ``group`` ``(n,)``.

        Args:
            latents: what the sampler finishes with, or a clean estimate.
            group: int64 on the CPU.
            images: the same latents decoded already.

        Raises:
            BudgetSpent: more rewards than the budget allows.
        """
        self._check_rewards(group)
        if images is None:
            images = self.decode(latents, group)
        parts = []
        for rows in self._split(len(latents)):
            self._check_time()
            far = rows.to(latents.device)
            with torch.no_grad(), self._timed("reward"):
                parts.append(self.scorer.score(latents[far], images[far], group[rows]))
            self._report()
        self.meter.add("reward_calls", group)
        return Scores.cat(parts)

    def preview(self, state: State) -> Scores:
        """Judge the clean estimates of an evaluated state."""
        if state.clean is None:
            raise ValueError("The state is not evaluated. Call engine.evaluate first.")
        scores = self.score(state.clean, state.group)
        self.offer(state, scores, finished=False)
        return scores

    def finish(self, state: State) -> Scores:
        """Run all particles to the end, judge them, and keep the best as answers."""
        state = self.run(state)
        scores = self.score(self.sampler.finish(state), state.group)
        self.offer(state, scores)
        return scores

    def offer(self, state: State, scores: Scores, *, finished: bool = True) -> None:
        """Keep samples that are better than the best so far.

        Args:
            state: the particles.
            scores: of them, row by row.
            finished: false of clean estimates, which stand until there are finished samples.
        """
        self._answers.offer(state, scores, finished=finished)
        self._report()

    def settle(self, state: State, scores: Scores, index: Tensor) -> None:
        """Make finished particles the answers, whatever was found before.

        For searches that return draws from a law rather than the best.

        Args:
            state: the finished particles.
            scores: of them, row by row.
            index: ``(n,)`` int64 rows to return, prompts in order, as many of each.
        """
        self._answers.settle(state, scores, index)
        self._report()

    @property
    def answers(self) -> Found:
        """The best samples so far: finished ones, or clean estimates before there are any.

        Raises:
            ConfigError: nothing was judged yet.
        """
        return self._answers.found

    @property
    def best_so_far(self) -> float | None:
        """The mean over the prompts of their best reward so far, or None before there is any."""
        return self._answers.mean_best

    def record(
        self,
        event: str,
        state: State,
        *,
        parents: Tensor | None = None,
        value: Tensor | None = None,
    ) -> None:
        """Tell the genealogy of a selection.

        Args:
            event: what happened; see :class:`~genscale.search.genealogy.Generation`.
            state: the particles after it.
            parents: ``(n,)`` rows of the generation before; None: they begin here.
            value: ``(n,)`` rewards known of them.
        """
        count = len(state)
        self.genealogy.generations.append(
            Generation(
                event,
                state.group,
                torch.full((count,), -1) if parents is None else parents,
                state.step,
                torch.full((count,), torch.nan, dtype=torch.float64) if value is None else value,
                state.seeds,
                state.lineage,
            )
        )

    # ------------------------------------------------------------------ the machine

    def _split(self, count: int) -> Iterator[Tensor]:
        yield from torch.split(torch.arange(count), self.micro_batch)

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        """Add the time of a block; on CUDA the device's queue is waited for."""
        began = time.perf_counter()
        yield
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.meter.add_seconds(kind, time.perf_counter() - began)

    def _report(self) -> None:
        if self._watch is not None:
            self._watch(self)


def _occurrence(index: Tensor) -> Tensor:
    """Return for each entry how many equal ones come before it."""
    order = torch.argsort(index, stable=True)
    sizes = torch.unique_consecutive(index[order], return_counts=True)[1]
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    place = torch.empty_like(index)
    place[order] = torch.arange(len(index)) - first
    return place
