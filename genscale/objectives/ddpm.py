"""Denoising diffusion in discrete steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from genscale.errors import ConfigError
from genscale.objectives.denoising import DenoisingObjective, PyramidWeights
from genscale.objectives.schedule import BetaSchedule, DiscreteVP
from genscale.objectives.time_input import TimeInput


class DDPM(DenoisingObjective):
    """Denoising diffusion with the plain loss (arXiv:2006.11239, eq. 14).

    x_n = sqrt(abar_n) x_0 + sqrt(1 - abar_n) eps with n uniform on 1 .. N; the network predicts
    eps and is trained with E |eps_hat - eps|^2. The defaults are the published recipe of DiMR
    (arXiv:2406.09416); process time is t = n / N.

    Args:
        target: ``"epsilon"``, ``"x0"``, or ``"v"`` = alpha eps - sigma x_0 (arXiv:2202.00512).
        betas: ``"sd_scaled_linear"`` or ``"linear"``; see
            :class:`~genscale.objectives.schedule.DiscreteVP`.
        num_timesteps: N.
        beta_range: first and last beta, where they are not the schedule's own.
        time_input: which number the network is fed (:mod:`genscale.objectives.time_input`).
        pyramid_weights: see :class:`~genscale.objectives.denoising.DenoisingObjective`.

    Shapes:
        x_0: ``(B, C, H, W)`` latents or pixels, roughly unit variance.
        n: ``(B,)``.
    """

    def __init__(
        self,
        *,
        target: Literal["epsilon", "x0", "v"] = "epsilon",
        betas: BetaSchedule = "sd_scaled_linear",
        num_timesteps: int = 1000,
        beta_range: Sequence[float] | None = None,
        time_input: TimeInput = "dimr_linear",
        pyramid_weights: PyramidWeights = "auto",
    ) -> None:
        if beta_range is not None and len(beta_range) != 2:
            raise ConfigError(
                f"objective.beta_range must be [first, last], but has {len(beta_range)} entries. "
                "Give e.g. [0.0001,0.02], or null for the schedule's own."
            )
        ends = None if beta_range is None else (float(beta_range[0]), float(beta_range[1]))
        super().__init__(
            process=DiscreteVP(betas, num_timesteps, ends),
            target=target,
            time_input=time_input,
            pyramid_weights=pyramid_weights,
        )
        self.num_timesteps = num_timesteps

    def sample_time(self, u: Tensor) -> Tensor:
        """Return t = n / N, n = 1 .. N, of keyed uniforms ``u`` ``(B,)`` float64."""
        return ((u * self.num_timesteps).floor() + 1.0) / self.num_timesteps
