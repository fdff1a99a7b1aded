"""Best of N (random search): sample N times, keep the best (arXiv:2501.09732, sec. 3)."""

from __future__ import annotations

from typing import ClassVar

from genscale.errors import ConfigError
from genscale.search.base import Search
from genscale.search.engine import Engine


class BestOfN(Search):
    """N independent samples a prompt; the first is the plain sample.

    Args:
        samples: N; None takes as many as the budget allows.

    Raises:
        ConfigError: fewer than one sample.
    """

    grows: ClassVar[str | None] = "samples"

    def __init__(self, samples: int | None = 8) -> None:
        if samples is not None and samples < 1:
            raise ConfigError(
                f"search.samples must be at least 1, but is {samples}. null takes as many as the "
                "budget allows."
            )
        self.samples = samples

    @property
    def label(self) -> str:
        """The name and N."""
        return f"BestOfN({'budget' if self.samples is None else self.samples})"

    def explore(self, engine: Engine) -> None:
        """Sample in rounds that fit one micro-batch, so that a search can end between them."""
        count = samples_afforded(engine, self.samples)
        rounds = max(1, engine.micro_batch // engine.num_prompts)
        for first in range(0, count, rounds):
            state = engine.start(min(rounds, count - first), first=first)
            scores = engine.finish(state)
            engine.record("start", state, value=scores.value)


def samples_afforded(
    engine: Engine, asked: int | None, *, nfe: float | None = None, rewards: int = 1
) -> int:
    """Return how many full samples a prompt the budget allows, ``asked`` at most.

    Args:
        engine: of the search.
        asked: None asks for as many as there can be.
        nfe: evaluations that one takes; None: those of a plain sample.
        rewards: that one takes.

    Raises:
        ConfigError: neither a number nor a budget.
    """
    affords = engine.affords(nfe=engine.costs.total if nfe is None else nfe, rewards=rewards)
    if asked is not None:
        return min(asked, affords)
    if engine.budget.nfe is None and engine.budget.reward_calls is None:
        raise ConfigError(
            "The search has no end: neither its number of samples nor a budget of evaluations or "
            "rewards was given. Give search.samples=8 or budget.nfe=..., say."
        )
    return affords
