"""Weighted particles of many prompts: log-weights, resampling, and what was recorded of them."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.search.potentials import Payments, PotentialName
from genscale.search.resampling import (
    Scheme,
    effective_size,
    log_normalise,
    normalise,
    resample,
    uniforms_needed,
)
from genscale.search.tempering import TemperingName, adapted, scheduled

_SLACK = 1e-9  # of an effective sample size: equal weights are not below their own number


class Population:
    """P weighted particles of each of G prompts.

    Log-weights are carried over where nothing is resampled, and start afresh where it is. A reward
    of -inf leaves a particle without weight; where a prompt has no other, the checkpoint tells
    nothing and its weights stay as they are.

    Args:
        prompts: G.
        particles: P.
        strength: ``(G,)`` float64, lambda of each prompt.
        potential: see :mod:`genscale.search.potentials`.
        scheme: see :func:`~genscale.search.resampling.resample`.
        threshold: resample where the effective sample size is below this share of P.
        tempering: see :mod:`genscale.search.tempering`; None has the full strength throughout.
        gamma: of geometric tempering.

    Attributes:
        log_weights: ``(G, P)`` float64, up to a constant a prompt.
        share: ``(G,)`` float64 of the full strength that is in force.
        ess: effective sample sizes ``(G,)`` at each checkpoint, before resampling.
        shares: ``share`` at each checkpoint.
        ancestors: ``(G, P)`` int64 at each checkpoint; each its own where nothing was resampled.
    """

    def __init__(
        self,
        prompts: int,
        particles: int,
        strength: Tensor,
        *,
        potential: PotentialName = "difference",
        scheme: Scheme = "ssp",
        threshold: float = 0.5,
        tempering: TemperingName | None = None,
        gamma: float = 0.008,
    ) -> None:
        self.strength = strength[:, None]
        self.scheme = scheme
        self.threshold = threshold
        self.tempering = tempering
        self.gamma = gamma
        self.log_weights = torch.zeros(prompts, particles, dtype=torch.float64)
        self.share = torch.full((prompts,), 1.0 if tempering is None else 0.0, dtype=torch.float64)
        self.ess: list[Tensor] = []
        self.shares: list[Tensor] = []
        self.ancestors: list[Tensor] = []
        self._payments = Payments(potential, (prompts, particles))
        self._forced = torch.zeros(prompts, dtype=torch.bool)

    @property
    def uniforms(self) -> int:
        """How many uniforms a prompt a resampling takes."""
        count = self.log_weights.shape[1]
        return uniforms_needed(self.scheme, count, count)

    def add(self, log_ratio: Tensor) -> None:
        """Multiply the weights by exp of ``(G, P)``: what a proposal is off the model's own law."""
        self.log_weights = self.log_weights + log_ratio

    def weigh(self, rewards: Tensor, fraction: float = 1.0) -> None:
        """Take the rewards of a checkpoint into the weights.

        Args:
            rewards: ``(G, P)`` float64; -inf where a reward could not tell.
            fraction: of the trajectory behind the particles, for tempering.
        """
        known, safe = self._known(rewards)
        base, slope = self._payments.offer(safe)
        base = base - self._payments.paid
        told = known.any(1)
        if self.tempering == "adaptive":
            start = torch.where(known, self.log_weights + base, -torch.inf)
            size = self.threshold * rewards.shape[1]
            share, below = adapted(start, self.strength * slope, self.share, size=size)
            self.share = torch.where(told, share, self.share)
            self._forced = below & told
        elif self.tempering is not None:
            self.share = torch.full_like(
                self.share, scheduled(self.tempering, fraction, self.gamma)
            )
        gained = base + self.share[:, None] * self.strength * slope
        self._gain(gained, known, told)
        self._payments.pay(self._payments.paid + gained, safe, known)

    def end(self, rewards: Tensor, uniforms: Tensor) -> Tensor:
        """Pay what is left to exp(lambda r) with the rewards of the finished samples.

        Args:
            rewards: ``(G, P)`` float64.
            uniforms: ``(G, K)``, for populations that are resampled at their end.

        Returns:
            ``(G, P)`` int64 ancestors: each its own, as the weights are kept.
        """
        known, safe = self._known(rewards)
        self._gain(self.strength * safe - self._payments.paid, known, known.any(1))
        self.share = torch.ones_like(self.share)
        own = torch.arange(rewards.shape[1]).expand_as(rewards)
        self._note(own, effective_size(self.log_weights))
        return own

    def resample(self, uniforms: Tensor) -> Tensor:
        """Choose who lives on, in the prompts whose weights have become too uneven.

        Args:
            uniforms: ``(G, K)`` float64, as many as the scheme takes.

        Returns:
            ``(G, P)`` int64 ancestors; each its own in the other prompts.
        """
        count = self.log_weights.shape[1]
        ess = effective_size(self.log_weights)
        chosen = self._forced | (ess < self.threshold * count * (1.0 - _SLACK))
        ancestors = torch.arange(count).repeat(len(ess), 1)
        if bool(chosen.any()):
            weights = normalise(self.log_weights[chosen])
            ancestors[chosen] = resample(weights, uniforms[chosen], self.scheme)
        self._note(ancestors, ess)
        self.log_weights = torch.where(chosen[:, None], 0.0, self.log_weights)
        self._payments.select(ancestors)
        self._forced = torch.zeros_like(chosen)
        return ancestors

    def record(self) -> dict[str, Tensor]:
        """Return what to report, prompts first.

        Returns:
            ``log_weights`` ``(G, P)``, normalised; ``ess`` and ``share`` ``(G, C)`` and
            ``ancestors`` ``(G, C, P)`` of C checkpoints, the end being the last; ``strength``
            ``(G,)``.
        """
        return {
            "log_weights": log_normalise(self.log_weights),
            "ess": torch.stack(self.ess, 1),
            "share": torch.stack(self.shares, 1),
            "ancestors": torch.stack(self.ancestors, 1),
            "strength": self.strength[:, 0],
        }

    def _known(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        known = rewards > -torch.inf
        return known, torch.where(known, rewards, 0.0)

    def _gain(self, gained: Tensor, known: Tensor, told: Tensor) -> None:
        found = torch.where(known, self.log_weights + gained, -torch.inf)
        self.log_weights = torch.where(told[:, None], found, self.log_weights)

    def _note(self, ancestors: Tensor, ess: Tensor) -> None:
        self.ess.append(ess)
        self.shares.append(self.share)
        self.ancestors.append(ancestors)
