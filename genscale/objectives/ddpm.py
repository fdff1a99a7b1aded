"""Denoising diffusion in discrete steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from genscale.backbones.base import BackboneOutput
from genscale.errors import ConfigError
from genscale.objectives.base import LossOutput, on
from genscale.objectives.conversion import clean_and_noise
from genscale.objectives.denoising import DenoisingObjective, PyramidWeights
from genscale.objectives.schedule import BetaSchedule, DiscreteVP
from genscale.objectives.time_input import TimeInput
from genscale.objectives.variational import variational_bound


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
        learn_sigma: also train the network's variance (``aux["variance"]``) by the variational
            bound, in bits per dimension (arXiv:2102.09672); the mean does not learn from it.
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
        learn_sigma: bool = False,
        time_input: TimeInput = "dimr_linear",
        pyramid_weights: PyramidWeights = "auto",
    ) -> None:
        if beta_range is not None and len(beta_range) != 2:
            raise ConfigError(
                f"objective.beta_range must be [first, last], but has {len(beta_range)} entries. "
                "Give e.g. [0.0001,0.02], or null for the schedule's own."
            )
        ends = None if beta_range is None else (float(beta_range[0]), float(beta_range[1]))
        process = DiscreteVP(betas, num_timesteps, ends)
        super().__init__(
            process=process,
            target=target,
            time_input=time_input,
            pyramid_weights=pyramid_weights,
        )
        self.steps = process
        self.num_timesteps = num_timesteps
        self.learn_sigma = learn_sigma

    def sample_time(self, u: Tensor) -> Tensor:
        """Return t = n / N, n = 1 .. N, of keyed uniforms ``u`` ``(B,)`` float64."""
        return ((u * self.num_timesteps).floor() + 1.0) / self.num_timesteps

    def complete_loss(
        self, result: LossOutput, output: BackboneOutput, clean: Tensor, x: Tensor, time: Tensor
    ) -> LossOutput:
        """Add the variational bound where the variance is learned.

        Raises:
            ConfigError: a network without learned variance.
        """
        if not self.learn_sigma:
            return result
        variance = output.aux.get("variance")
        if variance is None:
            raise ConfigError(
                "objective.learn_sigma=true needs a network that predicts its variance, but this "
                "one does not. Pass model.learn_sigma=true, or objective.learn_sigma=false."
            )
        alpha, sigma = (on(part, x) for part in self.steps.coefficients(time))
        guess, _ = clean_and_noise(self.target, output.sample.detach(), x, alpha, sigma)
        bound = variational_bound(clean, x, guess, variance, self.steps, time)
        terms = {"mse": result.loss.detach(), "vb": bound.detach().mean()}
        return LossOutput(
            result.loss + bound.mean(),
            {**result.terms, **terms},
            result.per_sample + bound.detach(),
            result.t,
        )
