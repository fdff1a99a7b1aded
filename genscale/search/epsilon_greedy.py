"""Epsilon-greedy search: improve the noise of every step in turn (arXiv:2506.03164)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError
from genscale.rng import Purpose
from genscale.samplers.base import State
from genscale.search.base import Search
from genscale.search.engine import Engine
from genscale.search.neighbours import cosine_of_step, neighbours
from genscale.search.proposals import (
    judge,
    random_steps,
    reunited,
    unburdened,
    ways_afforded,
)
from genscale.search.scorer import Scores, best_first


class EpsilonGreedy(Search):
    """At every step, K rounds of N noises around the best so far, or anywhere with chance epsilon.

    A candidate is fresh with probability epsilon; else it lies a random step away from the best
    noise, whose length is uniform in [0, radius] sqrt(D). The step is taken along the sphere
    through that noise: straight steps, as in the authors' program, would lead to noises of a norm
    that the model never saw. The first candidate of a step is the noise of the plain sample, and
    the best so far always competes.

    With T steps of one evaluation, the last one without noise, a diffusion model's sample costs
    1 + K N (T - 1) evaluations and K N (T - 1) + 1 rewards. Scale-wise models draw again from the
    same logits: T evaluations and K N T rewards.

    Args:
        candidates: N.
        rounds: K, fewer where the budget asks for it; None takes as many as it allows.
        epsilon: chance of a fresh noise, in [0, 1].
        radius: lambda of the paper, the longest step in units of sqrt(D).

    Raises:
        ConfigError: numbers out of range.
    """

    needs_noise = True
    grows: ClassVar[str | None] = "rounds"

    def __init__(
        self,
        candidates: int = 4,
        *,
        rounds: int | None = 20,
        epsilon: float = 0.4,
        radius: float = 0.15,
    ) -> None:
        if candidates < 1 or (rounds is not None and rounds < 1):
            raise ConfigError(
                "search.candidates and search.rounds must be at least 1, but are "
                f"{candidates} and {rounds}. rounds=null takes as many as the budget allows."
            )
        if not (0.0 <= epsilon <= 1.0 and radius > 0.0):
            raise ConfigError(
                f"search.epsilon must lie in [0, 1] and search.radius be positive, but they are "
                f"{epsilon} and {radius}. 0.4 and 0.15 are usual."
            )
        self.candidates = candidates
        self.rounds = rounds
        self.epsilon = float(epsilon)
        self.radius = float(radius)

    @property
    def label(self) -> str:
        """The name and everything that changes its results."""
        rounds = "budget" if self.rounds is None else self.rounds
        numbers = f"N {self.candidates}, K {rounds}, epsilon {self.epsilon:g}"
        return f"EpsilonGreedy({numbers}, radius {self.radius:g})"

    def explore(self, engine: Engine) -> None:
        """Improve the noise of one step after the other."""
        state = engine.evaluate(engine.start(1))
        engine.record("start", state)
        random = random_steps(engine.sampler, state)
        asked = None if self.rounds is None else self.rounds * self.candidates
        for step in range(len(random)):
            state = engine.evaluate(state)
            count = 1
            if bool(random[step]):
                count = ways_afforded(engine, asked, random, step=step, setting="search.rounds")
            searched = count > 1
            state = self._step(engine, state, step, count) if searched else engine.advance(state)
        if not searched:
            engine.finish(state)

    def _step(self, engine: Engine, state: State, step: int, count: int) -> State:
        """Take a step with the best of ``count`` noises."""
        every = torch.arange(len(state))
        best_noise = engine.sampler.step_noise(engine.model, state)
        best: tuple[State, Scores] | None = None
        parents = unburdened(engine, state)
        for done in range(0, count, self.candidates):
            number = min(self.candidates, count - done)
            noise = self._noises(engine, best_noise, step, done, number)
            rows = every.repeat_interleave(number)
            children = engine.advance(parents.select(rows), noise)
            children, scores = judge(engine, children)
            if best is not None:
                children = State.cat([best[0], children])
                scores = Scores.cat((best[1], scores))
                noise = torch.cat((best_noise, noise))
            chosen = best_first(engine.scorer.compare(scores), scores.group, 1)
            best = children.select(chosen), scores.select(chosen)
            best_noise = noise[chosen.to(noise.device)]
        assert best is not None  # count is at least 1
        engine.record("move", best[0], parents=every, value=best[1].value)
        return reunited(engine, best[0], state, every)

    def _noises(self, engine: Engine, best: Tensor, step: int, done: int, number: int) -> Tensor:
        """Return ``number`` noises a prompt ``(G * number, ...)`` around the best ``(G, ...)``."""
        places = torch.arange(done, done + number)
        keys = rng.key(engine.seeds[:, None], step, places[None], Purpose.NEIGHBOUR)
        directions = rng.normal(keys.to(best.device), tuple(best.shape[1:])).to(best.dtype)
        coins = rng.uniform(
            rng.key(engine.seeds[:, None], step, places[None], Purpose.CHOICE), (2,)
        )
        fresh = (coins[..., 0] < self.epsilon).to(best.device)
        cosine = cosine_of_step(best, self.radius * coins[..., 1])
        near = neighbours(best, directions, cosine)
        shape = (*fresh.shape, *([1] * (best.dim() - 1)))
        noise = torch.where(fresh.view(shape), directions, near)
        if done == 0:
            noise[:, 0] = best  # that of the plain sample
        return noise.flatten(0, 1)
