"""The best samples that a search has found so far, so that it may end at any time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.samplers.base import State
from genscale.search.scorer import Scorer, Scores, best_first


@dataclass(frozen=True, slots=True)
class Found:
    """Judged samples; rows are prompts in order, best first.

    Attributes:
        scores: of n samples.
        seeds: ``(n,)`` int64.
        lineage: ``(n,)`` int64.
        finished: ``(n,)`` bool, whether they took all their steps; else they are clean estimates.
    """

    scores: Scores
    seeds: Tensor
    lineage: Tensor
    finished: Tensor

    def select(self, index: Tensor) -> Found:
        """Take rows (int64 on the CPU)."""
        return Found(
            self.scores.select(index),
            self.seeds[index],
            self.lineage[index],
            self.finished[index],
        )

    @staticmethod
    def cat(parts: list[Found]) -> Found:
        """Join what was found."""
        return Found(
            Scores.cat([part.scores for part in parts]),
            torch.cat([part.seeds for part in parts]),
            torch.cat([part.lineage for part in parts]),
            torch.cat([part.finished for part in parts]),
        )


class Answers:
    """Keeps the best of every prompt: finished samples, and clean estimates until there are any.

    Args:
        num_prompts: G.
        top: samples to keep a prompt.
        scorer: says how candidates compare.
    """

    def __init__(self, num_prompts: int, top: int, scorer: Scorer) -> None:
        self.num_prompts = num_prompts
        self.top = top
        self._scorer = scorer
        self._finished: Found | None = None
        self._estimates: Found | None = None

    def offer(self, state: State, scores: Scores, *, finished: bool) -> None:
        """Keep samples that are better than the best so far, row by row of ``state``."""
        done = torch.full((len(scores),), finished)
        offered = Found(scores, state.seeds, state.lineage, done)
        kept = self._finished if finished else self._estimates
        joined = offered if kept is None else Found.cat([kept, offered])
        order = best_first(self._scorer.compare(joined.scores), joined.scores.group, self.top)
        if finished:
            self._finished = joined.select(order)
        else:
            self._estimates = joined.select(order)

    def settle(self, state: State, scores: Scores, index: Tensor) -> None:
        """Make finished particles ``index`` the answers, whatever was found before."""
        done = torch.ones(len(index), dtype=torch.bool)
        self._finished = Found(scores.select(index), state.seeds[index], state.lineage[index], done)

    @property
    def found(self) -> Found:
        """The answers of all prompts.

        Raises:
            ConfigError: a prompt has none.
        """
        whole = self._found_so_far()
        if whole is None or len(set(whole.scores.group.tolist())) < self.num_prompts:
            raise ConfigError(
                "The budget ended before every prompt had a sample that could be judged. Give a "
                "larger one."
            )
        return whole

    @property
    def mean_best(self) -> float | None:
        """The mean over the prompts of their best reward so far, or None before there is any."""
        whole = self._found_so_far()
        if whole is None:
            return None
        return float(
            whole.scores.value[best_first(whole.scores.value, whole.scores.group, 1)].mean()
        )

    def _found_so_far(self) -> Found | None:
        """Return finished samples, and estimates of prompts that have none, prompts in order."""
        if self._finished is None or self._estimates is None:
            return self._finished or self._estimates
        done = set(self._finished.scores.group.tolist())
        if len(done) == self.num_prompts:
            return self._finished
        missing = torch.tensor([g not in done for g in self._estimates.scores.group.tolist()])
        joined = Found.cat([self._finished, self._estimates.select(missing.nonzero()[:, 0])])
        return joined.select(torch.argsort(joined.scores.group, stable=True))
