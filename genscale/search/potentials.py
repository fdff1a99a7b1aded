"""Potentials of Feynman-Kac steering: what the rewards on the way say of a particle's weight.

The target is p(x_0) exp(lambda r(x_0)) (arXiv:2501.06848, sec. 3). Checkpoints k = 1, 2, ... of a
trajectory multiply a particle's weight by potentials G_k that look at the rewards r_1, ..., r_k of
its clean estimates; they only steer, because the last factor pays for them:

    (product over k of G_k) G_last = exp(lambda r(x_0)).

A potential is written as what a particle has been paid so far, L_k = log(G_1 ... G_k), so that
log G_last = lambda r(x_0) - L_K holds by construction, whatever the potential, and also where
lambda changes on the way (tempering):

    difference  L_k = lambda_k r_k
    max         L_k = L_(k-1) + lambda_k max(r_1, ..., r_k)
    sum         L_k = L_(k-1) + lambda_k (r_1 + ... + r_k)
    rt          L_k = L_(k-1) + lambda_k r_k
    is          L_k = 0: importance sampling at the end
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.search.names import check_name

PotentialName = Literal["difference", "max", "sum", "rt", "is"]


def check_potential(name: str) -> None:
    """Refuse a potential that there is not.

    Raises:
        ConfigError: an unknown name.
    """
    check_name("search.potential", name, get_args(PotentialName))


class Payments:
    """What particles were paid so far, and what their potential remembers of their rewards.

    Args:
        name: of the potential.
        shape: ``(G, P)``.

    Attributes:
        paid: ``(G, P)`` float64, L_k.
        memory: ``(G, P)`` float64 running maximum or sum of the rewards.
    """

    def __init__(self, name: PotentialName, shape: tuple[int, int]) -> None:
        check_potential(name)
        self.name = name
        self.paid = torch.zeros(shape, dtype=torch.float64)
        start = -torch.inf if name == "max" else 0.0
        self.memory = torch.full(shape, start, dtype=torch.float64)

    def offer(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Return (base, slope), ``(G, P)`` each, such that L_k = base + lambda_k slope.

        Args:
            rewards: ``(G, P)`` float64, finite.
        """
        if self.name == "difference":
            return torch.zeros_like(rewards), rewards
        if self.name == "is":
            return self.paid, torch.zeros_like(rewards)
        slope = rewards if self.name == "rt" else self._remembered(rewards)
        return self.paid, slope

    def pay(self, paid: Tensor, rewards: Tensor, known: Tensor) -> None:
        """Keep L_k and the rewards of the particles that are ``known`` ``(G, P)``."""
        self.paid = torch.where(known, paid, self.paid)
        self.memory = torch.where(known, self._remembered(rewards), self.memory)

    def select(self, ancestors: Tensor) -> None:
        """Let particles go on from their ancestors ``(G, P)``."""
        self.paid = self.paid.gather(1, ancestors)
        self.memory = self.memory.gather(1, ancestors)

    def _remembered(self, rewards: Tensor) -> Tensor:
        if self.name == "max":
            return torch.maximum(self.memory, rewards)
        if self.name == "sum":
            return self.memory + rewards
        return self.memory
