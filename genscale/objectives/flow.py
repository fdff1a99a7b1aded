"""Flow matching: straight paths, and the other paths of stochastic interpolants."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.denoising import DenoisingObjective, PyramidWeights
from genscale.objectives.paths import ContinuousVP, TrigonometricVP
from genscale.objectives.schedule import LinearFlow, NoiseProcess
from genscale.objectives.time_input import TimeInput
from genscale.objectives.time_sampler import TimeLaw, check_law, logit_normal, shifted

Path = Literal["linear", "gvp", "vp"]
FlowTarget = Literal["velocity", "epsilon", "score"]
Weighting = Literal["none", "velocity", "likelihood"]

_AWAY_FROM_ENDS = 1e-3  # where estimates are singular at pure noise
_VP_AWAY_FROM_DATA = 1e-5


class FlowMatching(DenoisingObjective):
    """Flow matching of a velocity field (arXiv:2210.02747, arXiv:2209.03003, arXiv:2401.08740).

    Path x_t = alpha x_0 + sigma eps from data x_0 to noise eps, t in [0, 1]. On the linear path,
    x_t = (1 - t) x_0 + t eps, the network predicts u = eps - x_0 and is trained with
    E |u_hat - u|^2; in general u = alpha' x_0 + sigma' eps. Interpolants may also predict the
    noise or the score s, with w |eps_hat - eps|^2 and w |sigma s_hat + eps|^2.

    Args:
        path: ``"linear"``; ``"gvp"``: cos and sin of pi t / 2; ``"vp"``: the VP equation with
            beta from 0.1 to 20.
        target: ``"velocity"``, ``"epsilon"`` or ``"score"``. The latter two say nothing of the
            data at pure noise: on ``linear`` and ``gvp`` their times stay 0.001 off both ends.
        weighting: w of ``epsilon`` and ``score``: 1, ``"velocity"`` (D / sigma)^2 or
            ``"likelihood"`` D / sigma^2, with D = sigma sigma' - sigma^2 alpha' / alpha.
        time_law: law of t: ``"logit_normal"`` (arXiv:2403.03206) or ``"uniform"``.
        time_mean: mean of logit t, for ``logit_normal``; above 0 prefers noisy times.
        time_std: standard deviation of logit t.
        time_shift: s moves the times drawn to s t / (1 + (s - 1) t); above 1 for large pictures.
        time_input: which number the network is fed (:mod:`genscale.objectives.time_input`); with
            ``"one_minus"`` a velocity is -u, the derivative by the network's own time.
        ignore_variance: accept networks with ``learn_sigma``, whose variance then stays as it is,
            as SiT's program does.
        pyramid_weights: see :class:`~genscale.objectives.denoising.DenoisingObjective`.
        self_conditioning: see there.

    Raises:
        ConfigError: an unknown name, an impossible number, or a weighting of velocities.

    Attributes:
        time_range: first and last training time.
        sampling_end: the time at which the probability-flow equation can still be integrated: 0,
            or 0.001 where its velocity is infinite or unknown at 0.

    Shapes:
        x_0: ``(B, C, H, W)`` latents or pixels, roughly unit variance.
        t: ``(B,)``.
    """

    def __init__(
        self,
        *,
        path: Path = "linear",
        target: FlowTarget = "velocity",
        weighting: Weighting = "none",
        time_law: TimeLaw = "logit_normal",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        time_shift: float = 1.0,
        time_input: TimeInput = "dimr_linear",
        ignore_variance: bool = False,
        pyramid_weights: PyramidWeights = "auto",
        self_conditioning: float = 0.0,
    ) -> None:
        for name, value, known in (
            ("path", path, get_args(Path)),
            ("target", target, get_args(FlowTarget)),
            ("weighting", weighting, get_args(Weighting)),
        ):
            if value not in known:
                raise ConfigError(
                    f"objective.{name} must be one of {', '.join(known)}, but is {value!r}."
                    f"{did_you_mean(str(value), known)}"
                )
        if weighting != "none" and target == "velocity":
            raise ConfigError(
                f"objective.weighting={weighting} weighs errors of epsilon and score, but "
                "objective.target is velocity. Use objective.weighting=none."
            )
        singular = target != "velocity" and path != "vp"
        super().__init__(
            process=_process_of(path, 1.0 - _AWAY_FROM_ENDS if singular else 1.0),
            target=target,
            time_input=time_input,
            pyramid_weights=pyramid_weights,
            self_conditioning=self_conditioning,
            ignore_variance=ignore_variance,
        )
        check_law(time_law, time_std, time_shift, path="objective")
        self.path = path
        self.weighting = weighting
        self.time_law = time_law
        self.time_mean = time_mean
        self.time_std = time_std
        self.time_shift = time_shift
        self.sampling_end = _AWAY_FROM_ENDS if singular or path == "vp" else 0.0
        if path == "vp":
            self.time_range = (_VP_AWAY_FROM_DATA, 1.0)
        else:
            self.time_range = (_AWAY_FROM_ENDS, 1.0 - _AWAY_FROM_ENDS) if singular else (0.0, 1.0)

    def sample_time(self, u: Tensor) -> Tensor:
        """Return t in [0, 1] of keyed uniforms ``u`` ``(B,)`` float64."""
        time = u if self.time_law == "uniform" else logit_normal(u, self.time_mean, self.time_std)
        time = shifted(time, self.time_shift)
        low, high = self.time_range
        return time if (low, high) == (0.0, 1.0) else low + (high - low) * time

    def error_scale(self, time: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """Return sqrt(w), times sigma for the score; None for velocities."""
        if self.target == "velocity":
            return None
        scale = sigma if self.target == "score" else torch.ones_like(sigma)
        if self.weighting == "none":
            return scale
        diffusion = score_diffusion(self.process, time)
        if self.weighting == "velocity":
            return scale * diffusion / sigma
        return scale * diffusion.sqrt() / sigma


def score_diffusion(process: NoiseProcess, time: Tensor) -> Tensor:
    """Return D = sigma sigma' - sigma^2 alpha' / alpha, float64, elementwise.

    It is half the squared diffusion of the forward equation, beta / 2 on VP paths; the velocity
    is (alpha' / alpha) x - D score.
    """
    alpha, sigma = process.coefficients(time)
    alpha_rate, sigma_rate = process.rates(time)
    return sigma * sigma_rate - sigma**2 * alpha_rate / alpha


def _process_of(path: Path, t_max: float) -> NoiseProcess:
    if path == "linear":
        return LinearFlow(t_max=t_max)
    return TrigonometricVP(t_max=t_max) if path == "gvp" else ContinuousVP()
