"""DPM-Solver++ that remembers: 2M, 2M SDE and 3M SDE."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import Level, on
from genscale.samplers.base import State
from genscale.samplers.grid import Precision, Schedule, estimates
from genscale.samplers.sde import GaussianSampler

Correction = Literal["midpoint", "heun"]


class DPMSolverMultistep(GaussianSampler):
    """Multistep DPM-Solver++ in data prediction, one evaluation a step (arXiv:2211.01095).

    With h the step in log(alpha / sigma), k = (1 + eta) h, and the clean estimates of this and of
    earlier steps,

    x' = (sigma' / sigma) e^(-eta h) x + alpha' [(1 - e^-k) clean + correction]
    + sigma' sqrt(1 - e^(-2 eta h)) z.

    The correction extrapolates the clean estimate: order 2 is 2M (eta 0) and 2M SDE, order 3 the
    form of 3M SDE. A particle without history (at the start, renoised, or changed) takes steps of
    order 1 and 2 first. The last step, to the clean level, returns the clean estimate.

    Args:
        steps: N, also the number of evaluations.
        order: 2 or 3.
        eta: 0 is deterministic, 1 the usual SDE.
        correction: of order 2: ``"midpoint"`` or ``"heun"``; order 3 has its own.
        schedule: see :class:`~genscale.samplers.grid.GridSampler`.
        shift: see there.
        precision: see there.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """

    def __init__(
        self,
        steps: int = 25,
        *,
        order: Literal[2, 3] = 2,
        eta: float = 0.0,
        correction: Correction = "midpoint",
        schedule: Schedule = "linear",
        shift: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(steps, schedule=schedule, shift=shift, precision=precision)
        if order not in (2, 3):
            raise ConfigError(
                f"sampler.order must be 2 or 3, but is {order}. 2 is usual; for 1 use sampler=ddim."
            )
        if not 0.0 <= eta < math.inf:
            raise ConfigError(
                f"sampler.eta must be finite and not negative, but is {eta}. 0 is deterministic, "
                "1 the usual SDE."
            )
        if correction not in get_args(Correction):
            raise ConfigError(
                f"sampler.correction must be one of {', '.join(get_args(Correction))}, but is "
                f"{correction!r}.{did_you_mean(str(correction), get_args(Correction))}"
            )
        self.order = order
        self.eta = float(eta)
        self.correction = correction

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.eta > 0.0

    def transition(self, state: State) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation ``(B,)`` of the next x; see the class."""
        clean, _ = estimates(state)
        now, then = self._between(state)
        h = _gap(then, now)
        fresh = h * self.eta if self.eta > 0.0 else torch.zeros_like(h)
        k = h + fresh
        keep = then.sigma / now.sigma * torch.exp(-fresh)
        pull = -torch.expm1(-k)
        x = state.x
        mean = on(keep, x) * x + on(then.alpha * pull, x) * clean
        for factor, difference in self._corrections(state, h, k, then):
            mean = mean + on(then.alpha * factor, x) * difference
        std = then.sigma * torch.sqrt(-torch.expm1(-2.0 * fresh))
        return mean, std.expand(len(state))

    def _corrections(
        self, state: State, h: Tensor, k: Tensor, then: Level
    ) -> list[tuple[Tensor, Tensor]]:
        """Return factors ``(B,)`` and the differences of clean estimates they multiply."""
        count = state.history["count"]
        if not bool((count > 0).any()):
            return []
        clean, previous = estimates(state)[0], state.history["clean"]
        # rows without history, and the step to the clean level, are of order 1
        usable = torch.where(then.sigma > 0, count, 0)
        r0 = self._gap_before(state, 0) / h
        phi_2 = torch.expm1(-k) / k + 1.0
        if self.order == 2:
            form = -0.5 * torch.expm1(-k) if self.correction == "midpoint" else phi_2
            return [(torch.where(usable > 0, form / r0, 0.0), clean - previous)]
        older = state.history["older"]
        r1 = self._gap_before(state, 1) / h
        phi_3 = phi_2 / k - 0.5
        three = usable > 1
        # d1 = d10 + (d10 - d11) r0 / (r0 + r1) and d2 = (d10 - d11) / (r0 + r1), with the divided
        # differences d10 = (clean - previous) / r0 and d11 = (previous - older) / r1
        shared = (phi_2 * r0 - phi_3) / (r0 + r1)
        first = torch.where(three, (phi_2 + shared) / r0, phi_2 / r0)
        second = torch.where(three, -shared / r1, 0.0)
        return [
            (torch.where(usable > 0, first, 0.0), clean - previous),
            (second, previous - older),
        ]

    def _gap_before(self, state: State, back: int) -> Tensor:
        """Return the step in log SNR that was taken ``back + 1`` steps ago; 1 where none was."""
        begin = state.step - 1 - back
        levels = [self._level(state, (begin + j).clamp_min(0)) for j in (0, 1)]
        return torch.where(begin >= 0, _gap(levels[1], levels[0]), 1.0)

    def _fresh_history(self, x: Tensor) -> dict[str, Tensor]:
        count = torch.zeros(len(x), dtype=torch.int64, device="cpu")
        names = ("clean",) if self.order == 2 else ("clean", "older")
        return {"count": count, **{name: torch.zeros_like(x) for name in names}}

    def _next_history(self, state: State) -> dict[str, Tensor]:
        history = {"count": state.history["count"] + 1, "clean": estimates(state)[0]}
        if self.order == 3:
            history["older"] = state.history["clean"]
        return history


def _gap(then: Level, now: Level) -> Tensor:
    """Return the change of log(alpha / sigma); infinite from pure noise and to the clean level."""
    return then.log_snr - now.log_snr
