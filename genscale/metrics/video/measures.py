"""Measures that give every clip numbers of its own, collected as one torchmetrics metric."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.metrics.keyed import KeyedMetric
from genscale.metrics.protocol import Setting
from genscale.metrics.subsets import keyed_rows
from genscale.metrics.video.clips import check_clips

Combined = tuple[float, dict[str, float]]

_MOST_REAL = 256  # held-out clips that a measure is told of, beside the samples
_REAL_A_PASS = 32


class ClipMeasure(ABC):
    """A number of a clip by itself, with no reference; averaged over clips.

    Attributes:
        name: of the metric.
        columns: what is kept of each clip.
        reads_captions: a clip without a caption has no number.
        unfit: why no clip may have a number, as a reason.
        resize: what happens to the size of frames first, as protocols call it.
    """

    name: str
    columns: tuple[str, ...] = ("value",)
    reads_captions: bool = False
    unfit: str = "no clip has enough frames"
    resize: str = "none"

    @property
    @abstractmethod
    def description(self) -> str:
        """How protocols name what is computed, with the network in it."""

    @property
    def sha256(self) -> str:
        """Digest of the network's weights; empty where there is none."""
        return ""

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Numbers that change the value, for the protocol."""
        return ()

    def check(self) -> list[str]:
        """Return a sentence for everything that is missing; weights are not read."""
        return []

    def prepare(self, device: torch.device) -> None:  # noqa: B027 - most have nothing to read
        """Read weights and move to the device."""

    @abstractmethod
    def of_clips(self, clips: Tensor, captions: Sequence[str] | None) -> Tensor:
        """Look at clips.

        Args:
            clips: uint8 ``(B, 1 or 3, T, H, W)``.
            captions: one a clip; None without any.

        Returns:
            ``(B, len(columns))`` float64; NaN where a clip has no such number.
        """

    def combine(self, rows: Tensor) -> Combined:
        """Return the value of a set and its details, of ``(n, len(columns))`` without NaN."""
        return _mean_and_std(rows[:, 0])


def _mean_and_std(values: Tensor) -> Combined:
    std = float(values.std()) if len(values) > 1 else 0.0
    return float(values.mean()), {"std": std}


class ClipMetrics(KeyedMetric):
    """Several measures of single clips.

    Args:
        measures: what is computed; every name once.

    Attributes:
        reasons: measures left out of the last result, with the reason.

    Raises:
        ConfigError: two measures have one name, or a name is no word.
    """

    def __init__(self, measures: Sequence[ClipMeasure]) -> None:
        names = [each.name for each in measures]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"'{name}' stands twice in metrics.clip_measures. Give one another name=..."
                )
            if not name.isidentifier():
                raise ConfigError(
                    f"'{name}' cannot name a measure of clips: letters, digits and _ are expected."
                )
        super().__init__(names, {name: (2, torch.float64) for name in names})
        self.by_name = {each.name: each for each in measures}
        self.reasons: dict[str, str] = {}
        self._real: dict[str, float] = {}

    def prepare(self, device: torch.device) -> None:
        """Read the weights of all measures in use."""
        for name in self.active:
            self.by_name[name].prepare(device)

    def look_at_real(self, clips: Tensor | None, seed: int) -> None:
        """Measure real held-out clips, for what the samples' numbers may be held against.

        At most 256 are taken, by the key. Measures that read captions have none.

        Args:
            clips: uint8 ``(n, C, T, H, W)``, or None.
            seed: key of the choice.
        """
        self._real = {}
        if clips is None:
            return
        chosen = clips[keyed_rows(len(clips), _MOST_REAL, seed).to(clips.device)]
        for name in self.active:
            measure = self.by_name[name]
            if measure.reads_captions:
                continue
            rows = [_checked(measure, part, None) for part in chosen.split(_REAL_A_PASS)]
            fitting = _without_nan(torch.cat(rows))
            if len(fitting):
                self._real[name] = measure.combine(fitting)[0]

    def update(
        self,
        clips: Tensor,
        captions: Sequence[str] | None = None,
        sample_ids: Tensor | None = None,
    ) -> None:
        """Look at clips.

        Args:
            clips: uint8 ``(B, 1 or 3, T, H, W)``.
            captions: what each was to show; None for samples without captions.
            sample_ids: ``(B,)`` int64 global numbers; on one process they may be left out.

        Raises:
            DataError: they are no clips, or captions are of another number.
        """
        check_clips(clips, "A measure of clips")
        if captions is not None and len(captions) != len(clips):
            raise DataError(
                f"{len(clips)} clips came with {len(captions)} captions. Give one a clip."
            )
        ids = self._check_ids(sample_ids, len(clips))
        rows = {}
        for name, measure in self.by_name.items():
            empty = torch.full((len(clips), len(measure.columns)), torch.nan, dtype=torch.float64)
            rows[name] = _checked(measure, clips, captions) if name in self.active else empty
        self._append(ids, len(clips), rows)

    def compute(self) -> dict[str, float]:
        """Return every active measure by name, as far as some clip has a number.

        :attr:`details` holds for each the number of clips, the spread over them, and what real
        held-out clips score.

        Raises:
            DataError: if there are no samples.
        """
        _, collected = self.collected()
        values: dict[str, float] = {}
        self.details, self.reasons = {}, {}
        for name in self.active:
            started = time.perf_counter()
            measure = self.by_name[name]
            fitting = _without_nan(collected[name])
            if not len(fitting):
                no_captions = "the samples have no captions"
                self.reasons[name] = no_captions if measure.reads_captions else measure.unfit
                continue
            values[name], details = measure.combine(fitting)
            told = {"n": len(fitting)} | details
            if name in self._real:
                told["real"] = self._real[name]
            self.details[name] = told | {"seconds": round(time.perf_counter() - started, 3)}
        return values


def _checked(measure: ClipMeasure, clips: Tensor, captions: Sequence[str] | None) -> Tensor:
    with torch.no_grad():
        rows = measure.of_clips(clips, captions).to("cpu", torch.float64)
    expected = (len(clips), len(measure.columns))
    if rows.shape != expected:
        raise DataError(
            f"The measure '{measure.name}' gave numbers of shape {tuple(rows.shape)}, but "
            f"{expected} was expected. Return one row a clip and one column a number it keeps."
        )
    return rows


def _without_nan(rows: Tensor) -> Tensor:
    return rows[~rows.isnan().any(dim=1)]
