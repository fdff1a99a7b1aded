"""What a search has spent and may still spend, a prompt each."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from genscale.samplers.base import State
from genscale.search.budget import Budget, BudgetSpent
from genscale.search.cost import BACKWARD, CostMeter, StepCosts, Work, state_bytes

SLACK = 1e-6  # of an evaluation: what float64 sums may be off by


class Ledger:
    """Counts what is spent, and refuses what the budget does not allow before it is made.

    Args:
        num_prompts: G.
        budget: the most to spend.
        costs: network evaluations of every step.
        work: operations of every step; None counts evaluations alone.

    Attributes:
        meter: what was spent.
        started: when the search began.
    """

    def __init__(
        self, num_prompts: int, budget: Budget, costs: StepCosts, work: Work | None
    ) -> None:
        self.num_prompts = num_prompts
        self.budget = budget
        self.costs = costs
        self.work = work
        self.meter = CostMeter(num_prompts)
        self.started = time.perf_counter()

    def count(self, before: State, after: State, *, backward: bool = False) -> None:
        """Count what one micro-batch spent between two states of the same particles.

        Args:
            before: a state.
            after: the same particles later.
            backward: count the way back through these evaluations, not the evaluations.
        """
        spent = after.nfe - before.nfe
        self.meter.add("backward_calls" if backward else "nfe", before.group, spent)
        if self.work is None:
            return
        spent = spent * BACKWARD if backward else spent
        last = len(self.work.flops) - 1
        # of several steps at once, evaluations are spread evenly over them
        steps = (after.step - before.step).clamp(min=1)
        places = torch.arange(last + 1)[None]
        inside = (places >= before.step[:, None].clamp(max=last)) & (
            places < (before.step.clamp(max=last) + steps)[:, None]
        )
        share = inside.double() / inside.sum(1, keepdim=True).clamp(min=1)
        flops, tokens = (
            (share * of[None]).sum(1) * spent for of in (self.work.flops, self.work.tokens)
        )
        self.meter.add("flops", before.group, flops)
        self.meter.add("tokens", before.group, tokens)
        calls = steps.double()
        traffic = self.work.weight_bytes * calls / len(before) + spent * state_bytes(before)
        self.meter.add("eflops", before.group, flops + self.work.intensity * traffic)

    def allow(self, group: Tensor, *, nfe: float = 0.0, judged: bool = False) -> None:
        """Ask for so many evaluations a particle of prompts ``group``, and for a reward each.

        Raises:
            BudgetSpent: the budget does not allow them.
        """
        self._check_nfe(group, torch.full((len(group),), nfe, dtype=torch.float64))
        if judged:
            self._check_rewards(group)

    def nfe_left(self) -> Tensor:
        """Return the evaluations each prompt has left, ``(G,)`` float64; inf without a limit.

        A way back through the network counts as two evaluations.
        """
        limit = torch.inf if self.budget.nfe is None else self.budget.nfe
        return limit - self.meter.nfe - BACKWARD * self.meter.backward_calls

    def rewards_left(self) -> Tensor:
        """Return the rewards each prompt has left, ``(G,)`` float64; inf without a limit."""
        limit = torch.inf if self.budget.reward_calls is None else self.budget.reward_calls
        return limit - self.meter.reward_calls

    def affords(self, *, nfe: float = 0.0, rewards: float = 0.0) -> int:
        """Return how often every prompt can still pay so much; a large number without a limit."""
        return int(self.each_affords(nfe=nfe, rewards=rewards).min())

    def each_affords(self, *, nfe: float = 0.0, rewards: float = 0.0) -> Tensor:
        """Return how often each prompt can still pay so much, ``(G,)`` int64; see :meth:`affords`.

        A search whose prompts spend differently asks for each, so that none depends on another.
        """
        times = torch.full((self.num_prompts,), 1 << 30, dtype=torch.int64)
        for left, price in ((self.nfe_left(), nfe), (self.rewards_left(), rewards)):
            if price > 0 and bool(left.isfinite().all()):
                times = times.minimum(((left + SLACK) / price).floor().long())
        return times.clamp(min=0)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the search began."""
        return time.perf_counter() - self.started

    def _reserve(self, state: State, costs: Tensor) -> None:
        self._check_nfe(state.group, self._of_step(costs, state.step))

    def _of_step(self, costs: Tensor, step: Tensor) -> Tensor:
        """Return the cost of each particle's step; 0 for those that have finished."""
        return torch.cat((costs, costs.new_zeros(1)))[step]

    def _check_nfe(self, group: Tensor, cost: Tensor) -> None:
        if self.budget.nfe is None:
            return
        asked = torch.zeros(self.num_prompts, dtype=torch.float64).index_add_(0, group, cost)
        if bool((asked > self.nfe_left() + SLACK).any()):
            raise BudgetSpent

    def _check_rewards(self, group: Tensor) -> None:
        if self.budget.reward_calls is None:
            return
        asked = torch.bincount(group, minlength=self.num_prompts)
        if bool((asked > self.rewards_left()).any()):
            raise BudgetSpent

    def _check_time(self) -> None:
        if self.budget.seconds is not None and self.seconds >= self.budget.seconds:
            raise BudgetSpent
