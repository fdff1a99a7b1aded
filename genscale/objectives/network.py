"""The generator view of a network: from its own parameterisation to clean and noise estimates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genscale.backbones.base import Backbone
from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.conversion import Extras, Target, clean_and_noise, network_input
from genscale.objectives.schedule import LinearFlow, NoiseProcess
from genscale.objectives.time_input import TimeInput, time_input_of

_TOLERANCE = 1e-6  # of log SNR, for levels that another program rounded


class NetworkView(Denoiser):
    """A backbone seen as a denoiser.

    A level with a time belongs to the view's own process. A level without one may come from any
    process: the network is asked at the time of equal signal-to-noise ratio, about x rescaled to
    its own path there (the interpolant conversion of arXiv:2503.19385). The estimates
    of clean and noise are the same on both paths, so every solver grid works with every network.

    The network runs in the dtype of its parameters, or under the caller's autocast; estimates are
    computed in x's own dtype, float32 or float64.

    Args:
        backbone: the network; gradients are left as they are.
        process: the process it was trained on.
        target: what it predicts.
        time_input: which number it is fed.
        sigma_data: standard deviation of the data, for the target ``edm``.
        sigma_in: its input scale; the network is told of sigma / sigma_in.
        shape: of the samples to be made; default is the network's ``sample_shape``.
    """

    def __init__(
        self,
        backbone: Backbone,
        process: NoiseProcess,
        target: Target,
        time_input: TimeInput,
        *,
        sigma_data: float = 0.5,
        sigma_in: float = 1.0,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        parameter = next(backbone.parameters())
        self.backbone = backbone
        self.process = process
        self.target = target
        self.time_input = time_input
        self.sigma_data = sigma_data
        self.sigma_in = sigma_in
        self.sample_shape = shape or backbone.sample_shape
        self.device = parameter.device
        self.dtype = parameter.dtype

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Estimate clean sample and noise of ``x`` ``(B, ...)``; one network evaluation.

        Raises:
            ValueError: a level noisier than the network has ever seen, or of another length than
                B or 1.
        """
        if len(level) not in (1, len(x)):
            raise ValueError(
                f"A level of {len(level)} rows was given for {len(x)} samples. Give one row a "
                "sample, or one for all."
            )
        own = level
        if level.time is None:
            own, scale = self._match(level)
            x = x / on(scale, x)
        moment = self.process.time_at(own)
        time = time_input_of(self.time_input, moment, own.alpha, own.sigma / self.sigma_in)
        alpha, sigma = on(own.alpha, x), on(own.sigma, x)
        extras = extras_of(self.target, self.process, moment, x, self.sigma_data, self.sigma_in)
        autocast = torch.is_autocast_enabled(x.device.type)
        # autocast leaves float64 alone, so that it would meet the network's float32 weights
        dtype = torch.float32 if autocast else self.dtype
        fed = network_input(self.target, x, alpha, sigma, extras).to(dtype)
        output = self.backbone(fed, time.to(x.device, non_blocking=True), cond, memory)
        prediction, variance = output.sample.to(x.dtype), output.aux.get("variance")
        variance = None if variance is None else variance.to(x.dtype)
        if velocity_is_reversed(self.target, self.time_input):
            prediction = -prediction
        clean, noise = clean_and_noise(self.target, prediction, x, alpha, sigma, extras)
        cost = torch.ones(len(x), dtype=torch.float64, device="cpu")
        return Prediction(clean, noise, output.memory, cost, variance)

    def _match(self, level: Level) -> tuple[Level, Tensor]:
        """Return the own level of equal SNR, and c such that (alpha, sigma) = c * its own."""
        log_snr = level.log_snr
        least = self.process.level(self.process.t_max).log_snr
        if bool((log_snr < least - _TOLERANCE).any()):
            raise ValueError(
                f"The level's log(alpha / sigma) is {float(log_snr.min()):.4g}, but this network "
                f"was trained on {float(least):.4g} and more. Start the grid at less noise."
            )
        own = self.process.level(self.process.time_of(log_snr))
        scale = torch.hypot(level.alpha, level.sigma) / torch.hypot(own.alpha, own.sigma)
        return own, scale


def extras_of(
    target: Target,
    process: NoiseProcess,
    time: Tensor,
    like: Tensor,
    sigma_data: float,
    sigma_in: float = 1.0,
) -> Extras:
    """Return what a target needs at times ``(B,)`` or ``(1,)``, on ``like``'s device and dtype."""
    if target != "velocity" or isinstance(process, LinearFlow):  # whose velocity is eps - x_0
        return Extras(None, sigma_data, sigma_in)
    alpha_rate, sigma_rate = process.rates(time)
    return Extras((on(alpha_rate, like), on(sigma_rate, like)), sigma_data)


def velocity_is_reversed(target: Target, time_input: TimeInput) -> bool:
    """Whether the network predicts x_0 - eps: a velocity is a derivative by the network's time."""
    return target == "velocity" and time_input == "one_minus"
