"""A door for black-box optimisers: ask for noises, tell their scores."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.rewards.base import Reward
from genscale.samplers.base import Sampler
from genscale.search.base import Search
from genscale.search.engine import Engine
from genscale.search.neighbours import deaf_to_noise
from genscale.search.noises import own_noises, run_noises
from genscale.search.proposals import check_end


class Optimiser(Protocol):
    """One prompt's optimisation under way; higher scores are better."""

    def ask(self, count: int) -> Tensor:
        """Return noises ``(count, K, ...)`` to try."""

    def tell(self, noises: Tensor, scores: Tensor) -> None:
        """Take the scores ``(count,)`` float64 of noises that were asked for; -inf is invalid."""


class Method(Protocol):
    """Settings of an optimiser.

    Attributes:
        label: the name and everything that changes its results.
    """

    @property
    def label(self) -> str:
        """The name and everything that changes its results."""

    def begin(self, first: Tensor, seed: int) -> Optimiser:
        """Begin one prompt's optimisation.

        Args:
            first: ``(K, ...)`` unit-normal noise of the plain sample, which is judged in any case.
                K is 1, or 1 + S with diffusion samplers that draw noise: of the start and each of
                S steps.
            seed: of all that the optimiser draws: the same seed must ask for the same noises.
        """


class AskTell(Search):
    """Drive an optimiser over start noises: a population a round, all prompts in one batch.

    Anything with :class:`Method`'s two members can be driven, another library's optimiser behind a
    class of ten lines, say. The plain sample is judged beside the first population. Diffusion
    models are searched by their start noise, and that of every step where steps draw noise;
    scale-wise ones by the normal numbers behind their token draws.

    With n_0 evaluations a sample, K rounds of N cost (1 + K N) n_0 evaluations and 1 + K N rewards.

    Args:
        method: the optimiser, :class:`~genscale.search.cross_entropy.CrossEntropy`, say.
        population: N noises a round; fewer in the last one, where the budget asks for it.
        rounds: K; None goes on while the budget lasts.

    Raises:
        ConfigError: numbers out of range.
    """

    grows: ClassVar[str | None] = "rounds"

    def __init__(self, method: Method, *, population: int = 8, rounds: int | None = 8) -> None:
        if population < 1 or (rounds is not None and rounds < 1):
            raise ConfigError(
                "search.population and search.rounds must be at least 1, but are "
                f"{population} and {rounds}. rounds=null goes on while the budget lasts."
            )
        self.method = method
        self.population = population
        self.rounds = rounds

    @property
    def label(self) -> str:
        """The optimiser and everything that changes its results."""
        rounds = "budget" if self.rounds is None else self.rounds
        return f"{self.method.label}, N {self.population}, K {rounds}"

    def problems(self, sampler: Sampler, reward: Reward | None = None) -> list[str]:
        """Also refuse samplers that noise does not move."""
        return super().problems(sampler, reward) + deaf_to_noise(type(self).__name__, sampler)

    def explore(self, engine: Engine) -> None:
        """Ask, sample, tell."""
        check_end(engine, self.rounds, "search.rounds")
        plain = own_noises(engine, engine.seeds)
        optimisers = [
            self.method.begin(first, seed)
            for first, seed in zip(plain, engine.seeds.tolist(), strict=True)
        ]
        number = 0
        while self.rounds is None or number < self.rounds:
            known = plain[:, None][:, : int(number == 0)]
            left = engine.affords(nfe=engine.costs.total, rewards=1) - known.shape[1]
            count = min(self.population, left)
            if count > 0:
                asked = torch.stack([_ask(each, count, plain[0]) for each in optimisers])
                noise = torch.cat((known, asked), 1)
            elif left == 0 and number == 0:
                noise = known  # nothing but the plain sample can be paid
            else:
                return
            size = noise.shape[1]
            wanted = torch.ones(noise.shape[:2], dtype=torch.bool)
            state = run_noises(engine, noise, engine.seeds, wanted)
            scores = engine.finish(state)
            engine.record("start", state, value=scores.value)
            order = engine.scorer.compare(scores).view(-1, size)[:, known.shape[1] :]
            if count > 0:
                for each, noises, values in zip(optimisers, asked, order, strict=True):
                    each.tell(noises, values)
            number += 1


def _ask(optimiser: Optimiser, count: int, like: Tensor) -> Tensor:
    """Return what an optimiser asks for, checked.

    Raises:
        ValueError: another number or shape of noises, or numbers that are not finite.
    """
    noises = torch.as_tensor(optimiser.ask(count)).to(like)
    if noises.shape != (count, *like.shape) or not bool(noises.isfinite().all()):
        raise ValueError(
            f"{type(optimiser).__name__}.ask({count}) must return finite noises of shape "
            f"{(count, *like.shape)}, but returned {tuple(noises.shape)}"
            f"{'' if bool(noises.isfinite().all()) else ' with numbers that are not finite'}."
        )
    return noises
