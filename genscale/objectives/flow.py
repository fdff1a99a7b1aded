"""Flow matching on straight paths."""

from __future__ import annotations

from torch import Tensor

from genscale.objectives.conversion import Target
from genscale.objectives.denoising import DenoisingObjective, PyramidWeights
from genscale.objectives.schedule import LinearFlow
from genscale.objectives.time_input import TimeInput
from genscale.objectives.time_sampler import TimeLaw, check_law, logit_normal, shifted


class FlowMatching(DenoisingObjective):
    """Rectified-flow training of a velocity field (arXiv:2210.02747, arXiv:2209.03003).

    Path x_t = (1 - t) x_0 + t eps from data x_0 to noise eps, t in [0, 1]; the network predicts
    the velocity u = eps - x_0 and is trained with E |u_hat - u|^2, without weighting.

    Args:
        time_law: law of t: ``"logit_normal"`` (arXiv:2403.03206) or ``"uniform"``.
        time_mean: mean of logit t, for ``logit_normal``; above 0 prefers noisy times.
        time_std: standard deviation of logit t.
        time_shift: s moves the times drawn to s t / (1 + (s - 1) t); above 1 for large pictures.
        time_input: which number the network is fed (:mod:`genscale.objectives.time_input`); with
            ``"one_minus"`` it predicts x_0 - eps, the derivative by its own time.
        pyramid_weights: see :class:`~genscale.objectives.denoising.DenoisingObjective`.

    Shapes:
        x_0: ``(B, C, H, W)`` latents or pixels, roughly unit variance.
        t: ``(B,)``.
    """

    def __init__(
        self,
        *,
        time_law: TimeLaw = "logit_normal",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        time_shift: float = 1.0,
        time_input: TimeInput = "dimr_linear",
        pyramid_weights: PyramidWeights = "auto",
    ) -> None:
        target: Target = "velocity"
        super().__init__(
            process=LinearFlow(),
            target=target,
            time_input=time_input,
            pyramid_weights=pyramid_weights,
        )
        check_law(time_law, time_std, time_shift, path="objective")
        self.time_law = time_law
        self.time_mean = time_mean
        self.time_std = time_std
        self.time_shift = time_shift

    def sample_time(self, u: Tensor) -> Tensor:
        """Return t in [0, 1] of keyed uniforms ``u`` ``(B,)`` float64."""
        time = u if self.time_law == "uniform" else logit_normal(u, self.time_mean, self.time_std)
        return shifted(time, self.time_shift)
