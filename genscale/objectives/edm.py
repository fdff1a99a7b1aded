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
    """Elucidated diffusion (arXiv:2206.00364).

    x = x_0 + sigma eps with ln sigma normal. The denoiser is D = c_skip x + c_out F(c_in x,
    ln(sigma) / 4) (eq. 7 and table 1), and the loss lambda(sigma) |D - x_0|^2 with
    lambda = 1 / c_out^2 (eq. 8), which is |F - (x_0 - c_skip x) / c_out|^2: the network's own
    error, of unit weight at every level.

    Args:
        sigma_data: standard deviation of the data; 0.5 for pixels in [-1, 1], about 1 for scaled
            latents.
        log_sigma_mean: mean of ln sigma in training (P_mean).
        log_sigma_std: its standard deviation (P_std).
        sigma_min: where sampling ends.
        sigma_max: where sampling starts.
        rho: sigma = sigma_max t^rho in process time; spaces grids, changes nothing in training.
        time_input: which number the network is fed (:mod:`genscale.objectives.time_input`).
        pyramid_weights: see :class:`~genscale.objectives.denoising.DenoisingObjective`.

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
        log_sigma_mean: float = -1.2,
        log_sigma_std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        time_input: TimeInput = "quarter_log_sigma",
        pyramid_weights: PyramidWeights = "auto",
    ) -> None:
        for name, value in (("sigma_data", sigma_data), ("log_sigma_std", log_sigma_std)):
            if not 0.0 < value < math.inf:
                raise ConfigError(
                    f"objective.{name} must be positive, but is {value}. 0.5 is usual."
                )
        super().__init__(
            process=VarianceExploding(float(sigma_min), float(sigma_max), float(rho)),
            target="edm",
            time_input=time_input,
            pyramid_weights=pyramid_weights,
            sigma_data=sigma_data,
        )
        self.log_sigma_mean = float(log_sigma_mean)
        self.log_sigma_std = float(log_sigma_std)

    def sample_time(self, u: Tensor) -> Tensor:
        """Return the process times of log-normal sigmas, of keyed uniforms ``u`` ``(B,)``."""
        # keyed uniforms are multiples of 2^-53 and may be 0, whose normal quantile is infinite
        z = torch.special.ndtri(u.double().clamp(2.0**-54, 1.0 - 2.0**-53))
        return self.process.time_of(-(self.log_sigma_mean + self.log_sigma_std * z))
