"""Progressive training of scale-wise models: coarse scales first, finer ones join (VAR)."""

from __future__ import annotations

from dataclasses import dataclass

from genscale.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressiveScales:
    """How many scales are trained, and how much the newest counts, by samples seen.

    Shares are of the whole training. Up to ``start`` only scales 0 .. ``first_scale`` are trained;
    further ones then join one by one, evenly, so that all are there before ``until``. The weight of
    a scale that has joined rises linearly from 0.01 to 1 over ``newest_warmup``.

    Args:
        total_samples: samples of the whole training: steps times batch size.
        until: share at which nothing is left to join, in (0, 1].
        first_scale: the finest scale of the beginning; models of fewer scales train all.
        start: share before the first one joins: the warm-up of the learning rate.
        newest_warmup: share over which a new scale's weight rises.

    Raises:
        ConfigError: shares out of order, or numbers out of range.
    """

    total_samples: int
    until: float
    first_scale: int = 4
    start: float = 0.02
    newest_warmup: float = 1 / 300

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.until <= 1:
            raise ConfigError(
                "objective.progressive needs 0 <= start < until <= 1, but start="
                f"{self.start} and until={self.until} were given. They are shares of the training."
            )
        if self.total_samples < 1 or self.first_scale < 0 or self.newest_warmup < 0:
            raise ConfigError(
                "objective.progressive needs total_samples of at least 1, and first_scale and "
                f"newest_warmup not negative, but {self.total_samples}, {self.first_scale} and "
                f"{self.newest_warmup} were given. Change them."
            )

    def stage(self, samples_seen: int, num_scales: int) -> tuple[int, float]:
        """Return how many scales are trained, and the weight of the newest of them.

        Args:
            samples_seen: before this batch.
            num_scales: S, of the model.
        """
        joining = num_scales - 1 - self.first_scale
        if joining <= 0:
            return num_scales, 1.0
        length = (self.until - self.start) / joining  # between two that join
        place = (samples_seen / self.total_samples - self.start) / length
        joined = min(max(int(place + 0.5), 0), joining)  # the nearest whole number
        if joined == 0:
            return self.first_scale + 1, 1.0  # the learning rate's warm-up serves the first
        age = (place - (joined - 0.5)) * length
        weight = 1.0 if self.newest_warmup == 0 else min(max(age / self.newest_warmup, 0.01), 1.0)
        return self.first_scale + 1 + joined, weight
