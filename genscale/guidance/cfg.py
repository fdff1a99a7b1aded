"""Classifier-free guidance (arXiv:2207.12598), constant, in an interval, or growing in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.guidance.branches import BranchGuidance, Guided, Rows, extrapolate
from genscale.objectives.base import Level, Prediction, on
from genscale.objectives.schedule import NoiseProcess

Form = Literal["constant", "power_cosine"]


class ClassifierFree(BranchGuidance):
    """u + w (c - u) with conditional c and unconditional u (arXiv:2207.12598, eq. 6).

    Scale w = 1 is the conditional prediction alone and w = 0 the unconditional one; a row where w
    is 1 costs one evaluation, every other row two, both branches in one batch. Programs that
    write c + w' (c - u), as DiMR's, have w = 1 + w': the published 0.4 is scale 1.4.

    Both branches describe one x, so the guided clean and noise estimates still satisfy
    x = alpha clean + sigma noise.

    Args:
        scale: w, constant or at t = 0.
        interval: guide only at process times t with lo < t <= hi; see
            :class:`~genscale.guidance.branches.BranchGuidance`.
        form: ``"constant"``, or ``"power_cosine"``: w(t) = 1 + (w - 1) (1 - cos(pi (1 - t)^p)) / 2,
            no guidance at pure noise, all of it at t = 0 (DiMR's sampler).
        power: p of ``power_cosine``; larger keeps guidance for later.
        rescale: share phi of the guided clean estimate that is brought back to the standard
            deviation of the conditional one (arXiv:2305.08891, eq. 15 and 16); 0 leaves it, 0.7
            is the paper's.
        channels: guide only the first channels; null guides all. parity: DiT's and SiT's programs
            guide 3 of the 4 latent channels.

    Raises:
        ConfigError: an unknown form or an impossible number.
    """

    def __init__(
        self,
        scale: float = 1.5,
        *,
        interval: Sequence[float] | None = None,
        form: Form = "constant",
        power: float = 1.0,
        rescale: float = 0.0,
        channels: int | None = None,
    ) -> None:
        super().__init__(scale, interval=interval, channels=channels)
        if form not in get_args(Form):
            raise ConfigError(
                f"guidance.form must be one of {', '.join(get_args(Form))}, but is {form!r}."
                f"{did_you_mean(str(form), get_args(Form))}"
            )
        if not 0.0 < power < math.inf:
            raise ConfigError(
                f"guidance.power must be positive, but is {power}. Give e.g. guidance.power=2."
            )
        if not 0.0 <= rescale <= 1.0:
            raise ConfigError(
                f"guidance.rescale must lie in [0, 1], but is {rescale}. 0 changes nothing, 0.7 is "
                "usual."
            )
        self.form = form
        self.power = float(power)
        self.rescale = float(rescale)

    @property
    def label(self) -> str:
        """The name, and what makes it more than a constant scale on all channels."""
        growing = f" growing with power {self.power:g}" if self.form == "power_cosine" else ""
        return super().label + growing + (f" rescaled by {self.rescale:g}" if self.rescale else "")

    def scale_at(self, level: Level, process: NoiseProcess) -> Tensor:
        """Return w of each row of a level, float64 on the CPU; exactly 1 where nothing guides."""
        scale = torch.full_like(level.alpha, self.scale)
        if self.form == "power_cosine":
            time = process.time_at(level) / process.t_max
            grown = 0.5 * (1.0 - torch.cos(math.pi * (1.0 - time).clamp(0.0, 1.0) ** self.power))
            scale = 1.0 + (scale - 1.0) * grown
        return self._inside(scale, level, process)

    def combine(self, own: Prediction, other: Prediction, rows: Rows) -> Guided:
        """Return u + w (c - u) of both estimates, rescaled if asked."""
        clean = extrapolate(own.clean, other.clean, rows.weight)
        noise = extrapolate(own.noise, other.noise, rows.weight)
        if self.rescale == 0.0:
            return Guided(clean, noise)
        moved = rescaled(clean, own.clean, self.rescale)
        return Guided(moved, follow(noise, moved - clean, rows.level))


def rescaled(guided: Tensor, own: Tensor, factor: float) -> Tensor:
    """Return phi g std(c) / std(g) + (1 - phi) g, standard deviations a sample, unbiased."""
    axes = tuple(range(1, guided.dim()))
    ratio = own.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return factor * guided * ratio + (1.0 - factor) * guided


def follow(noise: Tensor, change: Tensor, level: Level) -> Tensor:
    """Return the noise estimate that keeps x = alpha clean + sigma noise when clean changes."""
    # at the clean level the noise has no part in x
    ratio = torch.where(level.sigma > 0, level.alpha / level.sigma, 0.0)
    return noise - on(ratio, noise) * change
