"""EDM: denoising with preconditioned networks at log-normal noise levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.objectives.denoising import DenoisingObjective, PyramidWeights
from genscale.objectives.paths import VarianceExploding
from genscale.objectives.time_input import TimeInput


class EDM(DenoisingObjective):
    """Elucidated diffusion (arXiv:2206.00364), with an input scale (arXiv:2402.14797).

    x = x_0 + sigma eps with ln sigma normal. The denoiser is D = c_skip x + c_out F(c_in x,
    ln(sigma) / 4) (eq. 7 and table 1), and the loss lambda(sigma) |D - x_0|^2 with
    lambda = 1 / c_out^2 (eq. 8), which is |F - (x_0 - c_skip x) / c_out|^2: the network's own
    error, of unit weight at every level.

    More frames or pixels that say the same average noise away. The input scale k = ``sigma_in``
    weakens the data against it: z = x_0 / k + s eps, where s is all that the network is told, and
    by which it is trained: the target stays EDM's of s, D is solved from it, and lambda(s) |D -
    x_0|^2 weighs the network's error by ((s^2 + sigma_data^2) / (s^2 + sigma_data^2 / k))^2.
    Samplers, guidance and search see k z = x_0 + sigma eps with sigma = k s: the same trajectory
    in units of the data, which ends in data. So levels of samplers, such as ``churn_min`` or
    those of a schedule, are sigma; the settings below are s.

    Args:
        sigma_data: standard deviation of the data; 0.5 for pixels in [-1, 1], about 1 for scaled
            latents.
        sigma_in: k; sqrt(T) times the ratio of sides for T frames of larger pictures than EDM's
            64 pixels: 4 for 16 frames. 1 is EDM.
        log_sigma_mean: mean of ln s in training (P_mean).
        log_sigma_std: its standard deviation (P_std).
        sigma_min: the s where sampling ends.
        sigma_max: the s where sampling starts.
        rho: s = sigma_max t^rho in process time; spaces grids, changes nothing in training.
        time_input: which number the network is fed (:mod:`genscale.objectives.time_input`).
        pyramid_weights: see :class:`~genscale.objectives.denoising.DenoisingObjective`.
        self_conditioning: see there.

    Raises:
        ConfigError: an impossible number.

    Shapes:
        x_0: ``(B, C, H, W)`` latents or pixels.
        sigma: ``(B,)``.
    """

    def __init__(
        self,
        *,
        sigma_data: float = 0.5,
        sigma_in: float = 1.0,
        log_sigma_mean: float = -1.2,
        log_sigma_std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        time_input: TimeInput = "quarter_log_sigma",
        pyramid_weights: PyramidWeights = "auto",
        self_conditioning: float = 0.0,
    ) -> None:
        settings = {"sigma_data": sigma_data, "sigma_in": sigma_in, "log_sigma_std": log_sigma_std}
        usual = {"sigma_data": 0.5, "sigma_in": 1, "log_sigma_std": 1.2}
        for name, value in settings.items():
            if not 0.0 < value < math.inf:
                raise ConfigError(
                    f"objective.{name} must be positive, but is {value}. {usual[name]} is usual."
                )
        super().__init__(
            process=VarianceExploding(
                float(sigma_in * sigma_min), float(sigma_in * sigma_max), float(rho)
            ),
            target="edm",
            time_input=time_input,
            pyramid_weights=pyramid_weights,
            sigma_data=sigma_data,
            sigma_in=sigma_in,
            self_conditioning=self_conditioning,
        )
        self.log_sigma_mean = float(log_sigma_mean)
        self.log_sigma_std = float(log_sigma_std)

    def sample_time(self, u: Tensor) -> Tensor:
        """Return the process times of log-normal s, of keyed uniforms ``u`` ``(B,)``."""
        # keyed uniforms are multiples of 2^-53 and may be 0, whose normal quantile is infinite
        z = torch.special.ndtri(u.double().clamp(2.0**-54, 1.0 - 2.0**-53))
        log_sigma = self.log_sigma_mean + self.log_sigma_std * z + math.log(self.sigma_in)
        return self.process.time_of(-log_sigma)

    def error_scale(self, time: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """Return the root of the weight that lambda gives the network's error; None where 1."""
        if self.sigma_in == 1.0:
            return None
        square, data = (sigma / self.sigma_in) ** 2, self.sigma_data**2
        return (square + data) / (square + data / self.sigma_in)
