"""CFG-Zero*: guidance for flows that rescales the unconditional velocity."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from genscale.errors import ConfigError
from genscale.guidance.branches import BranchGuidance, Guided, Rows, extrapolate
from genscale.objectives.base import Denoiser, Prediction, on
from genscale.objectives.conversion import Extras, clean_and_noise
from genscale.objectives.schedule import DiscreteVP, NoiseProcess


class ZeroStar(BranchGuidance):
    """CFG-Zero* (arXiv:2503.18886): a u + w (c - a u), a = <c, u> / |u|^2 a sample, of velocities.

    Velocities are alpha' clean + sigma' noise in the process's own time. In the first part of
    sampling, where a network of a flow knows the mean at best, the velocity is set to 0; the clean
    estimate then says nothing, and no reward should look at it.

    Args:
        scale: w.
        zero_above: process time above which the velocity is 0; null never. The paper zeroes the
            first 4 % of steps, 0.96 on a linear grid.
        interval: see :class:`~genscale.guidance.branches.BranchGuidance`.

    Raises:
        ConfigError: an impossible number.
    """

    def __init__(
        self,
        scale: float = 1.5,
        *,
        zero_above: float | None = None,
        interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__(scale, interval=interval)
        if zero_above is not None and not 0.0 < zero_above <= 1.0:
            raise ConfigError(
                f"guidance.zero_above must lie in (0, 1], but is {zero_above}. Give a process "
                "time, e.g. 0.96, or null for never."
            )
        self.zero_above = None if zero_above is None else float(zero_above)

    def check(self, process: NoiseProcess) -> list[str]:
        """Return a sentence for a table of noise steps, along which there is no velocity."""
        if not isinstance(process, DiscreteVP):
            return []
        return [
            "guidance=cfg_zero_star guides the velocity of a flow, but the objective's process "
            "has separate noise steps. Use guidance=cfg, or a flow objective."
        ]

    def wrap(self, view: Denoiser) -> Denoiser:
        """Return the guided view.

        Raises:
            ConfigError: see :meth:`check`.
        """
        for problem in self.check(view.process):
            raise ConfigError(problem)
        return super().wrap(view)

    def combine(self, own: Prediction, other: Prediction, rows: Rows) -> Guided:
        """Return the estimates of the guided velocity."""
        x, process = rows.x, rows.process
        time = process.time_at(rows.level)
        alpha_rate, sigma_rate = (on(rate, x) for rate in process.rates(time))
        mine, null = (alpha_rate * part.clean + sigma_rate * part.noise for part in (own, other))
        velocity = extrapolate(mine, projection(mine, null) * null, rows.weight)
        if self.zero_above is not None:
            moving = (time <= self.zero_above * process.t_max).double()
            velocity = on(moving, x) * velocity
        alpha, sigma = on(rows.level.alpha, x), on(rows.level.sigma, x)
        extras = Extras((alpha_rate, sigma_rate))
        return Guided(*clean_and_noise("velocity", velocity, x, alpha, sigma, extras))


def projection(own: Tensor, other: Tensor) -> Tensor:
    """Return a = <c, u> / (|u|^2 + 1e-8) of each sample, ``(B, 1, ..., 1)``."""
    axes = tuple(range(1, own.dim()))
    inner = (own * other).sum(axes, keepdim=True)
    return inner / (other.square().sum(axes, keepdim=True) + 1e-8)
