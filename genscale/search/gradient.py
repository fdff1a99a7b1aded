"""Rewards differentiated back to the noises of a trajectory, and what that costs.

A way back through S network calls keeps the activations of all of them. ``checkpoint`` keeps the
input of each call alone and computes the rest again on the way back, at one more evaluation a
call; ``network_steps`` goes back through the last calls alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.samplers.base import Sampler, State
from genscale.samplers.diffusers_bridge import DiffusersSampler
from genscale.search.cost import BACKWARD, state_bytes
from genscale.search.engine import Engine
from genscale.search.frozen import frozen
from genscale.search.scorer import Scores


@dataclass(frozen=True, slots=True)
class Noises:
    """What is drawn of n trajectories.

    Attributes:
        start: ``(n, ...)`` unit normal, where they begin; None for those that go on.
        steps: ``(n, k, ...)`` unit normal, one for each of the k steps that are left; None leaves
            them to the sampler, which draws the same every time.
    """

    start: Tensor | None = None
    steps: Tensor | None = None


Build = Callable[[Tensor, Tensor], Noises]
"""Parameters ``(n, D)`` of particles ``(n,)`` (int64 on the CPU) -> their noises."""
Penalty = Callable[[Noises], Tensor]
"""Noises -> ``(n,)`` to be added to the loss."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Finished trajectories; nothing of the graph is left.

    Attributes:
        state: the finished particles.
        scores: of them.
        loss: ``(n,)`` float64 on the CPU, penalty included.
        gradient: ``(n, D)`` of the loss by the parameters; None where it was not asked for.
    """

    state: State
    scores: Scores
    loss: Tensor
    gradient: Tensor | None


class Differentiable(Denoiser):
    """A denoiser through whose calls a way back leads, or not.

    Where none leads, the network's input is stopped (DRTune, arXiv:2405.00760) and what it says
    taken as a constant v = alpha noise - sigma clean, so that the estimates follow x: clean moves
    by alpha / (alpha^2 + sigma^2), noise by sigma / (alpha^2 + sigma^2) of what x moves. That holds
    whatever the network predicts, and at pure noise too. On the way back it is one factor a step.

    Args:
        view: guided or not.
        through: whether the way back leads through the network.
        remember: keep all activations; else each call's input alone.
    """

    def __init__(self, view: Denoiser, *, through: bool = True, remember: bool = False) -> None:
        self.view = view
        self.through, self.remember = through, remember
        self.process, self.sample_shape, self.device = view.process, view.sample_shape, view.device

    def begin(self, batch: int, shape: tuple[int, ...]) -> Any:
        """Return the memory of videos that begin, as the view has it."""
        return self.view.begin(batch, shape)

    def refresh(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Let the view read finished frames; the way back leads through it, or does not."""
        if self.through:
            return self.view.refresh(x, level, cond, memory)
        with torch.no_grad():
            return self.view.refresh(x.detach(), level, cond, memory)

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Estimate clean sample and noise; the numbers are the view's own."""
        if not self.through:
            return self._straight(x, level, cond, memory)
        if self.remember or not torch.is_grad_enabled():
            return self.view(x, level, cond, memory)
        # networks in evaluation draw nothing, so there is no generator to set back
        found: Prediction = checkpoint(
            self.view, x, level, cond, memory, use_reentrant=False, preserve_rng_state=False
        )
        return found

    def _straight(self, x: Tensor, level: Level, cond: Conditioning, memory: Any) -> Prediction:
        with torch.no_grad():
            found = self.view(x.detach(), level, cond, memory)
        square = level.alpha**2 + level.sigma**2
        moved = x - x.detach()  # zero, with a gradient
        found.clean = found.clean + on(level.alpha / square, x) * moved
        found.noise = found.noise + on(level.sigma / square, x) * moved
        return found


class Trajectory:
    """From parameters of noises to the reward's loss, in micro-batches, with gradients.

    Args:
        engine: sampler, model, decoder and reward; counts and limits.
        checkpoint: keep the input of each network call alone, see the module.
        network_steps: the way back leads through the network in so many of the last steps, and
            past it in those before (:class:`Differentiable`); None: in all steps; 0: in none.
    """

    def __init__(
        self, engine: Engine, *, checkpoint: bool = True, network_steps: int | None = None
    ) -> None:
        self.engine = engine
        self.checkpoint = checkpoint
        last = engine.sampler.num_steps
        self.first = 0 if network_steps is None else max(0, last - network_steps)
        self.past = Differentiable(engine.model, through=False)
        self.through = Differentiable(engine.model, remember=not checkpoint)

    def frozen(self) -> AbstractContextManager[None]:
        """Return what keeps gradients from all weights on the way."""
        scorer = self.engine.scorer
        return frozen(self.engine.model, scorer.decode, scorer.reward)

    def price(self, base: State, *, gradient: bool = True) -> float:
        """Return the evaluations that a particle's trajectory takes, and its way back.

        Args:
            base: see :meth:`judge`.
            gradient: whether there is a way back; a call passed on it counts as two.
        """
        engine, begin = self.engine, int(base.step[0])
        last = engine.sampler.num_steps
        forward = engine.costs.between(begin, last)
        if base.clean is not None:
            forward -= float(engine.costs.evaluate[begin])
        back = engine.costs.between(self._back_to(base), last)
        return forward + ((BACKWARD + self.checkpoint) * back if gradient else 0.0)

    def judge(
        self,
        base: State,
        parameters: Tensor,
        build: Build,
        penalty: Penalty | None = None,
        *,
        gradient: bool = True,
    ) -> Judged:
        """Run trajectories to their end and judge them, each micro-batch there and back.

        Args:
            base: n particles at one step. Those not evaluated, of :meth:`Engine.start`, begin at
                their start noise; evaluated ones go on from where they are, which is not looked at
                again.
            parameters: ``(n, D)``.
            build: their noises.
            penalty: added to the loss.
            gradient: whether to go back too.

        Raises:
            BudgetSpent: the budget does not allow it; asked before anything is computed.
            ValueError: a loss without gradients, or a caller in inference mode.
        """
        if gradient and torch.is_inference_mode_enabled():
            raise ValueError(
                "Gradients were asked for in torch.inference_mode, where there are none. Search "
                "outside it; torch.no_grad is no hindrance."
            )
        engine, count = self.engine, len(base)
        engine.allow(base.group, nfe=self.price(base, gradient=gradient), judged=True)

        def work(rows: Tensor) -> Judged:
            part = base if len(rows) == count else base.select(rows)
            with torch.set_grad_enabled(gradient):
                leaf = parameters[rows.to(parameters.device)].detach().clone()
                leaf.requires_grad_(gradient)
                return self._there_and_back(part, leaf, build(leaf, rows), penalty)

        parts = engine.each(count, "gradient", work)
        gradients = [part.gradient for part in parts if part.gradient is not None]
        return Judged(
            State.cat([part.state for part in parts]),
            Scores.cat([part.scores for part in parts]),
            torch.cat([part.loss for part in parts]),
            torch.cat(gradients) if gradients else None,
        )

    def _there_and_back(
        self, base: State, leaf: Tensor, noises: Noises, penalty: Penalty | None
    ) -> Judged:
        engine = self.engine
        begin, turn, end = self._run(base, noises)
        latents = engine.sampler.finish(end)
        images = engine.scorer.decode(latents).float()
        scores, loss = engine.scorer.score_with_loss(latents, images, base.group)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"No gradient reaches the noise from reward {engine.scorer.reward.label}, although "
                "it calls itself differentiable. Look for a no_grad or a detach in its loss, or in "
                "the decoder."
            )
        if penalty is not None:
            loss = loss + penalty(noises).to(loss)
        gradient = None
        if torch.is_grad_enabled():
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            engine.count(turn, end, backward=True)
            if self.checkpoint:
                engine.count(turn, end)
        engine.count(begin, end)
        engine.meter.add("decodes", base.group)
        engine.meter.add("reward_calls", base.group)
        engine.state_bytes = max(engine.state_bytes, state_bytes(end))
        # history and memory would keep the graph alive, and nobody asks a finished particle
        end = end.replace(x=end.x.detach(), history={}, memory=None, pending=None)
        return Judged(end, scores, loss.detach().cpu().double(), gradient)

    def _run(self, base: State, noises: Noises) -> tuple[State, State, State]:
        """Return the first state, that to which the way back through the network leads, the last.

        Raises:
            ValueError: a start noise for particles that go on, or none for others.
        """
        sampler = self.engine.sampler
        if (noises.start is None) == (base.clean is None):
            raise ValueError(
                "Particles begin at a start noise, or go on from an evaluated state: give one of "
                "the two."
            )
        state = base
        if noises.start is not None:
            state = sampler.start(self.engine.model, base.cond, base.seeds, noises.start)
            state = state.replace(group=base.group, lineage=base.lineage)
        first, back_to = int(state.step[0]), self._back_to(base)
        states = [state]
        for step in range(first, sampler.num_steps):
            view = self.engine.model
            if torch.is_grad_enabled():
                view = self.through if step >= self.first else self.past
            own = None if noises.steps is None else noises.steps[:, step - first]
            states.append(sampler.advance(view, states[-1], own))
        return states[0], states[back_to - first], states[-1]

    def _back_to(self, base: State) -> int:
        """Return the first step through whose network calls the way back leads."""
        # what goes on from a given x has nothing to optimise before its first step
        return max(self.first, int(base.step[0]) + int(base.clean is not None))


def gradient_problems(name: str, sampler: Sampler) -> list[str]:
    """Return a sentence for everything that keeps gradients from a sampler's start.

    Args:
        name: of the search.
        sampler: of a diffusion model.
    """
    if sampler.nfe_is_bound:
        return [
            f"search {name} goes back through every step, but sampler {sampler.label} chooses its "
            "steps on the way, sample by sample. Use one of fixed steps, sampler=euler or "
            "sampler=heun, say."
        ]
    if isinstance(sampler, DiffusersSampler) and sampler.scheduler in _INEXACT:
        return [
            f"search {name} goes back through every step, but the gradients of {sampler.scheduler}"
            ", which divides by an alpha of almost 0, are noise. Use sampler=dpm_multistep, say."
        ]
    return []


# x / 1e-8 at pure noise: what cancels on the way there does not on the way back
_INEXACT = frozenset({"IPNDMScheduler"})
