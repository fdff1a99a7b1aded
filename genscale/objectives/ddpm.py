"""Denoising diffusion, in discrete steps and in continuous time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from genscale.backbones.base import BackboneOutput
from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import LossOutput, on
from genscale.objectives.conversion import clean_and_noise
from genscale.objectives.denoising import DenoisingObjective, PyramidWeights
from genscale.objectives.paths import ContinuousVP
from genscale.objectives.schedule import BetaSchedule, DiscreteVP
from genscale.objectives.time_input import TimeInput
from genscale.objectives.variational import variational_bound

Betas = Literal[BetaSchedule, "continuous"]

_CONTINUOUS_RANGE = (0.1, 20.0)
_CONTINUOUS_END = 1e-4  # where the published samplers of continuous models stop


class DDPM(DenoisingObjective):
    """Denoising diffusion with the plain loss (arXiv:2006.11239, eq. 14).

    x_n = sqrt(abar_n) x_0 + sqrt(1 - abar_n) eps with n uniform on 1 .. N; the network predicts
    eps and is trained with E |eps_hat - eps|^2. The defaults are the published recipe of DiMR
    (arXiv:2406.09416); process time is t = n / N.

    With ``betas="continuous"`` there are no steps: t is uniform on [0, 1) and alpha^2 =
    exp(-integral of beta), beta(t) = 0.1 + 19.9 t (arXiv:2011.13456), the recipe of most U-ViTs
    (arXiv:2209.12152).

    Args:
        target: ``"epsilon"``, ``"x0"``, or ``"v"`` = alpha eps - sigma x_0 (arXiv:2202.00512).
        betas: ``"sd_scaled_linear"`` or ``"linear"``, see
            :class:`~genscale.objectives.schedule.DiscreteVP`; or ``"continuous"``, see
            :class:`~genscale.objectives.paths.ContinuousVP`.
        num_timesteps: N; continuous time has none.
        beta_range: first and last beta, where they are not the schedule's own; beta(0) and
            beta(1) in continuous time.
        learn_sigma: also train the network's variance (``aux["variance"]``) by the variational
            bound, in bits per dimension (arXiv:2102.09672); the mean does not learn from it. The
            bound is over steps: continuous time has none.
        time_input: which number the network is fed (:mod:`genscale.objectives.time_input`).
        pyramid_weights: see :class:`~genscale.objectives.denoising.DenoisingObjective`.
        self_conditioning: see there.

    Raises:
        ConfigError: an unknown name, an impossible number, or settings of steps in continuous
            time.

    Shapes:
        x_0: ``(B, C, H, W)`` latents or pixels, roughly unit variance.
        n: ``(B,)``.
    """

    def __init__(
        self,
        *,
        target: Literal["epsilon", "x0", "v"] = "epsilon",
        betas: Betas = "sd_scaled_linear",
        num_timesteps: int = 1000,
        beta_range: Sequence[float] | None = None,
        learn_sigma: bool = False,
        time_input: TimeInput = "dimr_linear",
        pyramid_weights: PyramidWeights = "auto",
        self_conditioning: float = 0.0,
    ) -> None:
        if beta_range is not None and len(beta_range) != 2:
            raise ConfigError(
                f"objective.beta_range must be [first, last], but has {len(beta_range)} entries. "
                "Give e.g. [0.0001,0.02], or null for the schedule's own."
            )
        known = get_args(Betas)
        if betas not in known:
            raise ConfigError(
                f"objective.betas must be one of {', '.join(known)}, but is {betas!r}."
                f"{did_you_mean(str(betas), known)}"
            )
        ends = None if beta_range is None else (float(beta_range[0]), float(beta_range[1]))
        self.steps = None if betas == "continuous" else DiscreteVP(betas, num_timesteps, ends)
        if self.steps is None and (learn_sigma or num_timesteps != 1000):
            given = "learn_sigma=true" if learn_sigma else f"num_timesteps={num_timesteps}"
            raise ConfigError(
                f"objective.{given} is about noise steps, but objective.betas=continuous has none. "
                "Leave it out, or use objective.betas=linear."
            )
        super().__init__(
            process=self.steps or ContinuousVP(*(ends or _CONTINUOUS_RANGE), t_min=_CONTINUOUS_END),
            target=target,
            time_input=time_input,
            pyramid_weights=pyramid_weights,
            self_conditioning=self_conditioning,
        )
        self.num_timesteps = num_timesteps
        self.learn_sigma = learn_sigma

    @property
    def learns_variance(self) -> bool:
        """Whether a network's variance is trained."""
        return self.learn_sigma

    def sample_time(self, u: Tensor) -> Tensor:
        """Return times of keyed uniforms ``u`` ``(B,)`` float64.

        t = n / N, n = 1 .. N, or ``u`` itself in continuous time.
        """
        if self.steps is None:
            return u
        return ((u * self.num_timesteps).floor() + 1.0) / self.num_timesteps

    def complete_loss(
        self, result: LossOutput, output: BackboneOutput, clean: Tensor, x: Tensor, time: Tensor
    ) -> LossOutput:
        """Add the variational bound where the variance is learned."""
        if not self.learn_sigma or self.steps is None:
            return result
        variance = output.aux["variance"]
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
