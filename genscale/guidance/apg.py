"""Adaptive projected guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from genscale.errors import ConfigError
from genscale.guidance.branches import BranchGuidance, Guided, Rows
from genscale.guidance.cfg import follow
from genscale.objectives.base import Prediction


class ProjectedGuidance(BranchGuidance):
    """APG (arXiv:2410.02416, algorithm 1): guides the clean estimate across, not along, itself.

    With d = c - u of the clean estimates: momentum m <- d + beta m; m is shortened to norm r; its
    part along c is multiplied by eta; the result is u + w (what is left). The paper's own form is
    c + (w - 1) (...); the two agree where eta is 1, and this is the one in use elsewhere. Momentum
    is kept a particle and follows it; it stays as it is where nothing guides.

    Args:
        scale: w; large ones (5 to 15) stay natural.
        momentum: beta; negative ones push away from earlier directions.
        max_norm: r, over all elements of a sample; 0 never shortens.
        parallel: eta, the share kept of the part along c, which saturates colours.
        interval: see :class:`~genscale.guidance.branches.BranchGuidance`.

    Raises:
        ConfigError: an impossible number.
    """

    def __init__(
        self,
        scale: float = 4.0,
        *,
        momentum: float = -0.5,
        max_norm: float = 15.0,
        parallel: float = 0.0,
        interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__(scale, interval=interval)
        if not -1.0 < momentum < 1.0:
            raise ConfigError(
                f"guidance.momentum must lie in (-1, 1), but is {momentum}. "
                "-0.5 is usual, 0 is none."
            )
        if not 0.0 <= max_norm < math.inf:
            raise ConfigError(
                f"guidance.max_norm must not be negative, but is {max_norm}. 0 never shortens."
            )
        if not math.isfinite(parallel):
            raise ConfigError(f"guidance.parallel must be finite, but is {parallel}. 0 is usual.")
        self.momentum = float(momentum)
        self.max_norm = float(max_norm)
        self.parallel = float(parallel)

    def combine(self, own: Prediction, other: Prediction, rows: Rows) -> Guided:
        """Return the projected clean estimate, and the noise that belongs to it."""
        update = own.clean - other.clean
        if self.momentum != 0.0 and rows.memory is not None:
            update = update + self.momentum * rows.memory
        across = projected(update, own.clean, self.max_norm, self.parallel)
        clean = other.clean + rows.weight * across
        noise = follow(own.noise, clean - own.clean, rows.level)
        return Guided(clean, noise, update if self.momentum != 0.0 else None)


def projected(update: Tensor, own: Tensor, max_norm: float, parallel: float) -> Tensor:
    """Shorten an update ``(B, ...)`` to ``max_norm`` and shrink its part along ``own``.

    The projection is taken in float64: where guidance is weak both vectors are nearly parallel.
    """
    axes = tuple(range(1, update.dim()))
    if max_norm > 0.0:
        norm = update.square().sum(axes, keepdim=True).sqrt()
        update = update * (max_norm / norm).clamp(max=1.0)
    direction = own.double()
    length = direction.square().sum(axes, keepdim=True).sqrt().clamp_min(1e-12)
    direction = direction / length
    along = (update.double() * direction).sum(axes, keepdim=True) * direction
    return (update.double() - along + parallel * along).to(update.dtype)
