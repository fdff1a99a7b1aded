"""SVDD: at every step several proposals, of which the reward chooses (arXiv:2408.08252)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError
from genscale.rewards.base import Reward
from genscale.rng import Purpose
from genscale.samplers.base import Sampler
from genscale.search.base import Search
from genscale.search.engine import Engine
from genscale.search.proposals import judge, propose, random_steps, reunited, ways_afforded
from genscale.search.scorer import Scores, best_first


class SVDD(Search):
    """Take every step of B particles in M ways, and keep B of a prompt by the reward.

    The value of a proposal is the reward of its clean estimate (the "posterior mean" variant of the
    paper), and proposals are kept with probabilities softmax(value / temperature), without
    replacement; temperature 0 keeps the best, as the authors' program does. B > 1 is a beam search
    that starts from B noises. With M = 1 nothing is chosen and a particle is a plain sample.

    Of a diffusion model the kept proposals are evaluated already: T steps of one evaluation cost
    B (1 + M (T - 1)). With the last step without noise, as usual, there are B M (T - 1) + B
    rewards. Of a scale-wise model a proposal is another draw of a scale from the same logits, and
    is judged by the running latent: B T evaluations and B M T rewards.

    Args:
        proposals: M, fewer where the budget asks for it; None takes as many as it allows.
        beam: B.
        temperature: alpha of the paper, in units of the reward.

    Raises:
        ConfigError: numbers out of range.
    """

    needs_noise = True
    grows: ClassVar[str | None] = "proposals"

    def __init__(
        self, proposals: int | None = 10, *, beam: int = 1, temperature: float = 0.0
    ) -> None:
        if (proposals is not None and proposals < 1) or beam < 1:
            raise ConfigError(
                f"search.proposals and search.beam must be at least 1, but are {proposals} and "
                f"{beam}. proposals=null takes as many as the budget allows."
            )
        if not 0.0 <= temperature < float("inf"):
            raise ConfigError(
                f"search.temperature must be a finite number that is not negative, but is "
                f"{temperature}. 0 keeps the best proposal."
            )
        self.proposals = proposals
        self.beam = beam
        self.temperature = float(temperature)

    @property
    def label(self) -> str:
        """The name and everything that changes its results."""
        count = "budget" if self.proposals is None else self.proposals
        return f"SVDD(M {count}, beam {self.beam}, temperature {self.temperature:g})"

    def problems(self, sampler: Sampler, reward: Reward | None = None) -> list[str]:
        """Also refuse weights made of values that are none."""
        found = super().problems(sampler, reward)
        if reward is not None and self.temperature > 0.0 and not reward.potential:
            found.append(
                f"search SVDD with a temperature weighs proposals by exp(reward / temperature), "
                f"but {reward.label} ranks candidates among each other. Use search.temperature=0."
            )
        return found

    def least(self, engine: Engine) -> tuple[float, int]:
        """Return the evaluations and rewards of B plain samples."""
        return self.beam * engine.costs.total, self.beam

    def explore(self, engine: Engine) -> None:
        """Propose, judge, keep; step by step."""
        state = engine.evaluate(engine.start(self.beam))
        engine.record("start", state)
        random = random_steps(engine.sampler, state)
        for step in range(len(random)):
            state = engine.evaluate(state)
            ways = self._ways(engine, random, step)
            children = propose(engine, state, ways)
            if ways == 1:  # nothing to choose from
                state = reunited(engine, children, state, torch.arange(len(state)))
                continue
            children, scores = judge(engine, children)
            chosen = self._choose(engine, scores, step, ways)
            parents = chosen // ways
            state = reunited(engine, children.select(chosen), state, parents)
            engine.record("keep", state, parents=parents, value=scores.value[chosen])
        if ways == 1:
            engine.finish(state)

    def _ways(self, engine: Engine, random: Tensor, step: int) -> int:
        """Return the proposals of each particle at a step: M, or what the budget allows."""
        if not bool(random[step]):
            return 1
        return ways_afforded(
            engine,
            self.proposals,
            random,
            step=step,
            particles=self.beam,
            setting="search.proposals",
        )

    def _choose(self, engine: Engine, scores: Scores, step: int, ways: int) -> Tensor:
        """Return the rows to keep, B a prompt."""
        if self.temperature == 0.0:
            return best_first(engine.scorer.compare(scores), scores.group, self.beam)
        # the B largest of logits with Gumbel noise are draws without replacement
        places = torch.arange(len(scores)) % (self.beam * ways)
        keys = rng.key(engine.seeds[scores.group], step, places, Purpose.RESAMPLE)
        gumbel = -torch.log(-torch.log(rng.uniform(keys).clamp_min(2.0**-54)))
        return best_first(scores.value / self.temperature + gumbel, scores.group, self.beam)
