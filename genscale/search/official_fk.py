"""parity: the arithmetic of Feynman-Kac steering's own program (arXiv:2501.06848), quirks included.

It weighs in exponentials rather than logarithms, and differs from
:mod:`genscale.search.population` where that changes the law of the samples:

* where an adaptive run does not resample, the weight that was found is dropped, and so is the
  reward it was found from: the population's rewards are overwritten;
* the last correction of ``max`` and ``sum`` takes the running maximum or sum in place of the last
  reward, so that the target is exp(lambda max r) and exp(lambda sum r);
* weights are cut off at 1e10, and what is not a number counts as 0;
* where nothing is resampled at the end, the particles are returned without weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.search.population import Population
from genscale.search.potentials import PotentialName
from genscale.search.resampling import draw_from

_MOST = 1e10


class OfficialSteering:
    """Weighs and resamples populations as the official program does.

    Args:
        prompts: G populations.
        particles: P in each.
        potential: see :mod:`genscale.search.potentials`.
        strength: lambda.
        reward_min: what particles are taken to have earned before the first reward.
        adaptive: resample only where the effective sample size is below half of P.
        adaptive_at_end: the same for the last resampling of a run that is not adaptive.

    Attributes:
        rewards: ``(G, P)`` float64 rewards that the next ones are held against.
        product: ``(G, P)`` of the potentials that particles were resampled with.
        weights: ``(G, P)`` of the last step; -1 where nothing was resampled.
        ess: ``(G,)`` effective sample sizes at the last step; P where nothing was weighed.
    """

    def __init__(
        self,
        prompts: int,
        particles: int,
        *,
        potential: PotentialName = "difference",
        strength: float = 10.0,
        reward_min: float = 0.0,
        adaptive: bool = False,
        adaptive_at_end: bool = False,
    ) -> None:
        shape = (prompts, particles)
        self.potential = potential
        self.strength = strength
        self.adaptive = adaptive
        self.adaptive_at_end = adaptive_at_end
        self.rewards = torch.full(shape, reward_min, dtype=torch.float64)
        self.product = torch.ones(shape, dtype=torch.float64)
        self.weights = torch.full(shape, -1.0, dtype=torch.float64)
        self.ess = torch.full((prompts,), float(particles), dtype=torch.float64)

    def step(self, rewards: Tensor, uniforms: Tensor, *, final: bool = False) -> Tensor:
        """Take the rewards of a checkpoint and choose who lives on.

        Args:
            rewards: ``(G, P)`` float64.
            uniforms: ``(G, P)`` float64 in [0, 1), a particle each.
            final: whether these are the rewards of the finished samples.

        Returns:
            ``(G, P)`` int64 ancestors; each its own where nothing was resampled.
        """
        count = rewards.shape[1]
        own = torch.arange(count).expand(len(rewards), -1)
        self.weights = torch.full_like(self.product, -1.0)
        self.ess = torch.full_like(self.ess, float(count))
        if self.potential == "is" and not final:
            return own
        earned, weights = self._weigh(rewards, final)
        share = weights / weights.sum(1, keepdim=True)
        self.ess = 1.0 / share.square().sum(1)
        chosen = torch.ones(len(rewards), dtype=torch.bool)
        if self.adaptive or (final and self.adaptive_at_end):
            chosen = self.ess < 0.5 * count
        drawn = draw_from(share, uniforms)
        ancestors = torch.where(chosen[:, None], drawn, own)
        gained = torch.where(chosen[:, None], self.product * weights, self.product)
        self.weights = torch.where(chosen[:, None], weights, -1.0)
        # parity: overwritten also where nothing was resampled, which loses the weight
        self.rewards = earned.gather(1, ancestors)
        self.product = gained.gather(1, ancestors)
        return ancestors

    def _weigh(self, rewards: Tensor, final: bool) -> tuple[Tensor, Tensor]:
        """Return what the population is said to have earned, and its weights, both ``(G, P)``."""
        if self.potential == "max":
            earned = torch.maximum(rewards, self.rewards)
        elif self.potential == "sum":
            earned = rewards + self.rewards
        else:
            earned = rewards
        if self.potential == "difference":
            weights = torch.exp(self.strength * (rewards - self.rewards))
        else:
            weights = torch.exp(self.strength * earned)
            if final:
                weights = weights / self.product
        weights = torch.nan_to_num(weights.clamp(0.0, _MOST), nan=0.0)
        # our own guard: the program would divide by zero
        empty = weights.sum(1, keepdim=True) == 0
        return earned, torch.where(empty, 1.0, weights)


class OfficialPopulation(Population):
    """A population that :class:`OfficialSteering` weighs; its log-weights are always even.

    Args:
        prompts: G.
        particles: P.
        strength: ``(G,)`` float64, the same of all prompts.
        potential: see :mod:`genscale.search.potentials`.
        adaptive: resample only where the effective sample size is below half of P.
    """

    def __init__(
        self,
        prompts: int,
        particles: int,
        strength: Tensor,
        *,
        potential: PotentialName = "difference",
        adaptive: bool = False,
    ) -> None:
        super().__init__(prompts, particles, strength, potential=potential, scheme="multinomial")
        self.steering = OfficialSteering(
            prompts,
            particles,
            potential=potential,
            strength=float(strength[0]),
            adaptive=adaptive,
        )
        self._rewards = torch.zeros(prompts, particles, dtype=torch.float64)

    def weigh(self, rewards: Tensor, fraction: float = 1.0) -> None:
        """Keep the rewards ``(G, P)`` of a checkpoint for :meth:`resample`."""
        self._rewards = rewards

    def resample(self, uniforms: Tensor) -> Tensor:
        """Choose who lives on; ``(G, P)`` int64 ancestors."""
        return self._take(self._rewards, uniforms, final=False)

    def end(self, rewards: Tensor, uniforms: Tensor) -> Tensor:
        """Choose among the finished samples; ``(G, P)`` int64 ancestors."""
        return self._take(rewards, uniforms, final=True)

    def _take(self, rewards: Tensor, uniforms: Tensor, *, final: bool) -> Tensor:
        drawn = uniforms[:, : rewards.shape[1]]
        ancestors = self.steering.step(rewards, drawn, final=final)
        self._note(ancestors, self.steering.ess)
        return ancestors
