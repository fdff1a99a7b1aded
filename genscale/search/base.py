"""The contract of a search: a sampler's states and a budget -> the best samples that were found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from genscale.errors import ConfigError
from genscale.objectives.base import Family
from genscale.rewards.base import Reward
from genscale.samplers.base import Sampler
from genscale.samplers.grid import GridSampler
from genscale.samplers.sde import GaussianSampler
from genscale.search.budget import BudgetSpent
from genscale.search.cost import CostMeter
from genscale.search.engine import Engine
from genscale.search.genealogy import Genealogy


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search returns; rows are prompts in order, ``top`` rows each, best first.

    Attributes:
        latents: ``(n, ...)`` what was decoded.
        images: ``(n, C, H, W)``, or clips ``(n, C, T, H, W)``, float32 in about [-1, 1].
        group: ``(n,)`` int64 prompts.
        rewards: ``(n,)`` float64 of what was searched for, by name: ``reward`` and its parts.
        held_out: ``(n,)`` float64 rewards that the search did not see, by name.
        cost: what was spent, a prompt each.
        genealogy: who descends from whom.
        seeds: ``(n,)`` int64 seeds of the returned particles.
        lineage: ``(n,)`` int64 of them.
        finished: ``(n,)`` bool; false where the budget ended before a sample of the prompt was
            finished: then it is a clean estimate.
        invalid: rewards that were not finite, or that the reward called invalid.
        state_bytes: memory of one particle's state.
        seconds: wall-clock seconds of the whole.
        extra: what one search alone has to tell, ``(G, ...)`` each: log-weights, temperatures.
    """

    latents: Tensor
    images: Tensor
    group: Tensor
    rewards: dict[str, Tensor]
    held_out: dict[str, Tensor]
    cost: CostMeter
    genealogy: Genealogy
    seeds: Tensor
    lineage: Tensor
    finished: Tensor
    invalid: int
    state_bytes: float
    seconds: float
    extra: dict[str, Tensor] = field(default_factory=dict)


class Search(ABC):
    """An algorithm that spends a budget; frozen settings, no state.

    Attributes:
        families: of models it can search.
        needs_noise: the sampler's steps must draw noise, else copies of a particle stay equal.
        needs_renoise: the sampler must be able to go back to an earlier noise level.
        needs_transition: steps must be draws from normals of known density.
        needs_gradient: the reward must be differentiable.
        needs_potential: the reward's values must make sense as weights.
        grows: the setting that None sizes by the budget, of which scaling studies make use.
    """

    families: ClassVar[frozenset[Family]] = frozenset({"diffusion", "scale_wise"})
    needs_noise: ClassVar[bool] = False
    needs_renoise: ClassVar[bool] = False
    needs_transition: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    needs_potential: ClassVar[bool] = False
    grows: ClassVar[str | None] = None

    @property
    def label(self) -> str:
        """What protocols and reports call it: the name, and what changes its results."""
        return type(self).__name__

    @property
    def returns_many(self) -> bool:
        """Whether a prompt gets several samples, which sets of one sample each cannot hold."""
        return False

    def problems(self, sampler: Sampler, reward: Reward | None = None) -> list[str]:
        """Return a sentence for everything that keeps this search from this sampler and reward."""
        name = type(self).__name__
        if sampler.family not in self.families:
            kinds = " or ".join(sorted(each.replace("_", "-") for each in self.families))
            return [
                f"search {name} works on {kinds} models, but the model is "
                f"{sampler.family.replace('_', '-')}. Choose another search=..."
            ]
        found = []
        if self.needs_transition and not isinstance(sampler, GaussianSampler):
            found.append(
                f"search {name} needs steps of known density, but sampler {sampler.label} has none."
                " Use sampler=ddim sampler.eta=1, or sampler=reverse_sde."
            )
        elif self.needs_noise and not sampler.stochastic:
            found.append(
                f"search {name} needs a sampler that draws noise, else copies of a particle stay "
                f"equal, but {sampler.label} is deterministic with these settings. "
                + (
                    "Use sampler=ddim sampler.eta=1, say."
                    if sampler.family == "diffusion"
                    else "Use a positive sampler.temperature, and sampler.top_k other than 1."
                )
            )
        if self.needs_renoise and not isinstance(sampler, GridSampler):
            found.append(
                f"search {name} goes back to higher noise levels, which sampler {sampler.label} "
                "cannot. Use sampler=euler, say."
            )
        if reward is not None and self.needs_gradient and not reward.differentiable:
            found.append(
                f"search {name} follows the gradient of the reward, but {reward.label} has none. "
                "Choose a differentiable reward=..."
            )
        if reward is not None and self.needs_potential and not reward.potential:
            found.append(
                f"search {name} weighs particles by exp(lambda reward), but {reward.label} ranks "
                "candidates among each other. Choose a reward with values of its own."
            )
        return found

    def least(self, engine: Engine) -> tuple[float, int]:
        """Return the evaluations and rewards a prompt that the first answer takes."""
        return engine.costs.total, 1

    def run(self, engine: Engine) -> SearchResult:
        """Search until done or until the budget is spent, and return the best found.

        Raises:
            ConfigError: a budget that does not reach one answer, or parts that do not fit.
        """
        problems = self.problems(engine.sampler, engine.scorer.reward)
        nfe, rewards = self.least(engine)
        for name, price in (("nfe", nfe), ("reward_calls", rewards)):
            limit = getattr(engine.budget, name)
            if limit is not None and limit < price:
                problems.append(
                    f"budget.{name}={limit:g} is smaller than the {price:g} that one sample takes "
                    f"with search {type(self).__name__}. Give at least that."
                )
        if problems:
            raise ConfigError("\n".join(problems))
        extra: dict[str, Tensor] = {}
        with suppress(BudgetSpent):  # the best so far stands
            extra = self.explore(engine) or {}
        return self._result(engine, extra)

    @abstractmethod
    def explore(self, engine: Engine) -> dict[str, Tensor] | None:
        """Search; offer finished samples to the engine, which keeps the best of each prompt.

        May end with :class:`~genscale.search.budget.BudgetSpent` at any call.

        Returns:
            what to report beside the samples, or None.
        """

    def _result(self, engine: Engine, extra: dict[str, Tensor]) -> SearchResult:
        answers = engine.answers
        scores = answers.scores
        held_out = engine.scorer.watch(scores.images, scores.group)
        engine.meter.add("held_out_calls", scores.group, float(len(held_out)))
        return SearchResult(
            latents=scores.latents,
            images=scores.images,
            group=scores.group,
            rewards={"reward": scores.value, **scores.parts},
            held_out=held_out,
            cost=engine.meter,
            genealogy=engine.genealogy,
            seeds=answers.seeds,
            lineage=answers.lineage,
            finished=answers.finished,
            invalid=engine.scorer.invalid,
            state_bytes=engine.state_bytes,
            seconds=engine.seconds,
            extra=extra,
        )
