"""Descent on the noises of many prompts at once: each has its own clip, best and end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import Family
from genscale.rewards.base import Reward
from genscale.samplers.base import Sampler, State
from genscale.search.base import Search
from genscale.search.engine import Engine
from genscale.search.gradient import Build, Judged, Noises, Trajectory, gradient_problems
from genscale.search.row_lbfgs import RowLBFGS

OptimiserName = Literal["sgd", "adam", "lbfgs"]
Penalty = Callable[[Noises, int], Tensor]
"""Noises and number of the iteration -> ``(n,)`` to be added to the loss."""

MET = "met"  # the part of a reward that says, by 1, that there is nothing left to ask for


@dataclass(frozen=True, slots=True)
class Descent:
    """How parameters go down; settings alone.

    Args:
        iterations: steps at most; None takes as many as the budget allows.
        optimiser: ``"sgd"``, with Nesterov's momentum 0.9; ``"adam"``: AdamW; ``"lbfgs"``.
        rate: learning rate.
        clip: the most that a particle's gradient may measure, or None; not of ``lbfgs``, which
            reads curvature from it.
        patience: a prompt ends when its reward said :data:`MET` so many times in a row.
        epsilon: of ``adam``.
        decay: of ``adam``: what a step takes from the parameters, in rates.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """

    iterations: int | None
    optimiser: OptimiserName
    rate: float
    clip: float | None
    patience: int = 2
    epsilon: float = 1e-8
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.optimiser not in get_args(OptimiserName):
            known = get_args(OptimiserName)
            raise ConfigError(
                f"search.optimiser must be one of {', '.join(known)}, but is {self.optimiser!r}."
                f"{did_you_mean(str(self.optimiser), known)}"
            )
        for name, value, least in (
            ("iterations", self.iterations, 0),
            ("rate", self.rate, 0.0),
            ("clip", self.clip, 0.0),
            ("patience", self.patience, 1),
        ):
            if value is not None and not least <= value < float("inf"):
                raise ConfigError(
                    f"search.{name} must be at least {least} and finite, but is {value}."
                )

    def words(self) -> list[str]:
        """Return what labels say of it."""
        count = "budget" if self.iterations is None else str(self.iterations)
        clip = "none" if self.clip is None else f"{self.clip:g}"
        return [count, f"{self.optimiser} {self.rate:g}", f"clip {clip}"]

    def run(
        self,
        engine: Engine,
        trajectory: Trajectory,
        base: State,
        parameters: Tensor,
        build: Build,
        penalty: Penalty | None = None,
    ) -> dict[str, Tensor]:
        """Go down from ``parameters`` ``(G, D)`` and offer every sample on the way to the engine.

        Args:
            engine: of G prompts.
            trajectory: on it.
            base: one particle a prompt.
            parameters: with which the sample is the plain one.
            build: noises of parameters.
            penalty: added to the loss.

        Returns:
            ``iterations`` ``(G,)`` int64, steps taken; ``loss`` ``(G, iterations + 1)`` float64 on
            the way, NaN after the end; ``sound`` ``(G,)`` bool, false where a prompt ended because
            its gradient was not finite.
        """
        steps = self.steps_afforded(engine, trajectory, base)
        update = self._updates(parameters)
        count, last = len(base), engine.sampler.num_steps
        losses = torch.full((count, steps + 1), torch.nan, dtype=torch.float64)
        values = losses[:, 0].clone()
        streak = torch.zeros(count, dtype=torch.int64)
        sound = torch.ones(count, dtype=torch.bool)
        rows = torch.arange(count)
        ended = base.replace(step=torch.full_like(base.step, last))
        with trajectory.frozen():
            for turn in range(steps + 1):
                judged = self._judge(
                    trajectory, base, parameters, build, penalty, rows, turn, turn < steps
                )
                engine.offer(judged.state, judged.scores)
                losses[rows, turn], values[rows] = judged.loss, judged.scores.value
                parents = torch.arange(count) if turn > 0 else None
                event = "move" if turn > 0 else "start"
                engine.record(event, ended, parents=parents, value=values.clone())
                if judged.gradient is None:
                    break
                gradient = torch.zeros_like(parameters)
                gradient[rows.to(gradient.device)] = judged.gradient
                sound[rows] = judged.loss.isfinite() & judged.gradient.isfinite().all(1).cpu()
                streak[rows] = (streak[rows] + 1) * _met(judged)
                parameters = update(losses[:, turn], gradient)
                rows = rows[(streak[rows] < self.patience) & sound[rows]]
                if len(rows) == 0:
                    break
        taken = (~losses.isnan()).sum(1) - 1
        return {"iterations": taken.clamp(min=0), "loss": losses, "sound": sound}

    def steps_afforded(self, engine: Engine, trajectory: Trajectory, base: State) -> int:
        """Return how many steps the budget allows, with the sample to which the last one leads.

        Raises:
            ConfigError: neither a number nor a budget.
        """
        if self.iterations is None and engine.budget.nfe is engine.budget.reward_calls is None:
            raise ConfigError(
                "The search has no end: neither its number of iterations nor a budget of "
                "evaluations or rewards was given. Give search.iterations=50 or budget.nfe=..., "
                "say."
            )
        left = engine.nfe_left().min() - trajectory.price(base, gradient=False)
        steps = min(
            float(left) / trajectory.price(base) + 1e-9,
            float(engine.rewards_left().min()) - 1,
            math.inf if self.iterations is None else self.iterations,
        )
        return max(0, math.floor(steps))

    def _judge(
        self,
        trajectory: Trajectory,
        base: State,
        parameters: Tensor,
        build: Build,
        penalty: Penalty | None,
        rows: Tensor,
        turn: int,
        gradient: bool,
    ) -> Judged:
        """Judge the prompts ``rows``, those that have not ended."""

        def noises(own: Tensor, part: Tensor) -> Noises:
            return build(own, rows[part])

        def extra(given: Noises) -> Tensor:
            assert penalty is not None
            return penalty(given, turn)

        return trajectory.judge(
            base if len(rows) == len(base) else base.select(rows),
            parameters[rows.to(parameters.device)],
            noises,
            None if penalty is None else extra,
            gradient=gradient,
        )

    def _updates(self, parameters: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what takes losses ``(G,)`` and gradients ``(G, D)`` and gives new parameters.

        Everything is done element by element or row by row, so that prompts do not meet.
        """
        if self.optimiser == "lbfgs":
            place, search = parameters, RowLBFGS(parameters, rate=self.rate)

            def step(losses: Tensor, gradient: Tensor) -> Tensor:
                nonlocal place
                place = search.step(place, losses.to(gradient), gradient)
                return place

            return step
        held = torch.nn.Parameter(parameters.clone())
        optimiser: torch.optim.Optimizer
        if self.optimiser == "sgd":
            optimiser = torch.optim.SGD([held], self.rate, momentum=0.9, nesterov=True)
        else:
            optimiser = torch.optim.AdamW(
                [held], self.rate, eps=self.epsilon, weight_decay=self.decay
            )

        def move(losses: Tensor, gradient: Tensor) -> Tensor:
            held.grad = gradient if self.clip is None else clip_rows(gradient, self.clip)
            optimiser.step()
            return held.detach().clone()

        return move


class NoiseDescent(Search):
    """A search that goes down the gradient of the reward's loss by noises, of diffusion models."""

    families = frozenset[Family]({"diffusion"})
    needs_gradient = True

    def problems(self, sampler: Sampler, reward: Reward | None = None) -> list[str]:
        """Return a sentence for everything that keeps this search from this sampler and reward."""
        found = super().problems(sampler, reward)
        if sampler.family in self.families:
            found += gradient_problems(type(self).__name__, sampler)
        return found


def clip_rows(gradient: Tensor, most: float) -> Tensor:
    """Shorten the rows ``(n, D)`` that are longer than ``most``."""
    length = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    share = (most / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp(max=1.0)
    clipped: Tensor = gradient * share
    return clipped


def _met(judged: Judged) -> Tensor:
    """Return ``(n,)`` int64: 1 where the reward has nothing left to ask for."""
    part = judged.scores.parts.get(MET)
    return torch.zeros(len(judged.loss), dtype=torch.int64) if part is None else (part > 0).long()
