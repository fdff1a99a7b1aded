"""Ancestral sampling with a variance that a network has learned."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import on
from genscale.objectives.schedule import NoiseProcess
from genscale.samplers.base import State
from genscale.samplers.grid import Precision, Schedule, estimates
from genscale.samplers.sde import GaussianSampler

Variance = Literal["learned", "lower", "upper"]
_NONE_LEARNED = (
    "sampler.variance=learned needs a network with learned variance, but this one has none. Use "
    "sampler.variance=lower, or train with model.learn_sigma=true."
)


class Ancestral(GaussianSampler):
    """DDPM's ancestral steps, between any two levels (arXiv:2006.11239, 2102.09672).

    The mean is that of the posterior q(x' | x, clean). Its variance lies between the posterior's
    own, b' (``"lower"``, the same as ``ddim`` with eta 1), and that of the forward step, b
    (``"upper"``): log variance = f log b + (1 - f) log b', where the network says f = (v + 1) / 2
    of each element (``"learned"``, eq. 15). On a grid that skips steps both are those of the
    longer step. The last step adds no noise. DiT samples so, with 250 steps on ``discrete``.

    Args:
        steps: N, also the number of evaluations.
        variance: ``"learned"`` asks for a network with learned variance.
        schedule: see :class:`~genscale.samplers.grid.GridSampler`.
        shift: see there.
        precision: see there.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """

    def __init__(
        self,
        steps: int = 250,
        *,
        variance: Variance = "learned",
        schedule: Schedule = "discrete",
        shift: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(steps, schedule=schedule, shift=shift, precision=precision)
        if variance not in get_args(Variance):
            raise ConfigError(
                f"sampler.variance must be one of {', '.join(get_args(Variance))}, but is "
                f"{variance!r}.{did_you_mean(str(variance), get_args(Variance))}"
            )
        self.variance = variance

    def check(self, process: NoiseProcess, *, learned_variance: bool) -> list[str]:
        """Also ask for a learned variance where it is to be used."""
        problems = super().check(process, learned_variance=learned_variance)
        missing = self.variance == "learned" and not learned_variance
        return problems + [_NONE_LEARNED] * missing

    def transition(self, state: State) -> tuple[Tensor, Tensor]:
        """Return mean, and standard deviation ``(B,)``, or shaped as x where it is learned.

        Raises:
            ConfigError: a network that has not learned its variance.
            ValueError: a state that is not evaluated.
        """
        clean, noise = estimates(state)
        now, then = self._between(state)
        upper = (now.sigma**2 - (now.alpha / then.alpha * then.sigma) ** 2).clamp_min(0.0)
        lower = upper * (then.sigma / now.sigma) ** 2
        kept = torch.sqrt((then.sigma**2 - lower).clamp_min(0.0))
        mean = on(then.alpha, clean) * clean + on(kept, clean) * noise
        random = then.sigma > 0
        if self.variance != "learned":
            std = torch.where(random, upper if self.variance == "upper" else lower, 0.0).sqrt()
            return mean, std.expand(len(state))
        if state.variance is None:
            raise ConfigError(_NONE_LEARNED)
        share = 0.5 * (state.variance + 1.0)
        low, high = (torch.where(random, part, 1.0).log() for part in (lower, upper))
        log_variance = share * on(high, clean) + (1.0 - share) * on(low, clean)
        return mean, on(random.double(), clean) * torch.exp(0.5 * log_variance)
