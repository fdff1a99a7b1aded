"""Measures that give every sample numbers of its own, collected as one torchmetrics metric."""

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

Combined = tuple[float, dict[str, float]]

_MOST_REAL = 256  # held-out samples that a measure is told of, beside those made
_REAL_A_PASS = 32


class SampleMeasure(ABC):
    """A number of a sample by itself, with no reference; averaged over samples.

    Attributes:
        name: of the metric.
        columns: what is kept of each sample.
        reads_captions: a sample without a caption has no number.
        unfit: why no sample may have a number, as a reason.
        resize: what happens to the size of pictures first, as protocols call it.
    """

    name: str
    columns: tuple[str, ...] = ("value",)
    reads_captions: bool = False
    unfit: str
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
    def look(self, samples: Tensor, captions: Sequence[str] | None) -> Tensor:
        """Look at samples.

        Args:
            samples: uint8 pictures ``(B, 1 or 3, H, W)``, or clips ``(B, 1 or 3, T, H, W)``.
            captions: one a sample; None without any.

        Returns:
            ``(B, len(columns))`` float64; NaN where a sample has no such number.
        """

    def combine(self, rows: Tensor) -> Combined:
        """Return the value of a set and its details, of ``(n, len(columns))`` without NaN."""
        return _mean_and_std(rows[:, 0])


def _mean_and_std(values: Tensor) -> Combined:
    std = float(values.std()) if len(values) > 1 else 0.0
    return float(values.mean()), {"std": std}


class SampleMetrics(KeyedMetric):
    """Several measures of single samples.

    Args:
        measures: what is computed; every name once.

    Attributes:
        kind: what a sample is, in the singular.
        reasons: measures left out of the last result, with the reason.

    Raises:
        ConfigError: two measures have one name, or a name is no word.
    """

    kind: str

    def __init__(self, measures: Sequence[SampleMeasure]) -> None:
        names = [each.name for each in measures]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"'{name}' stands twice in metrics.{self.kind}_measures. Give one another "
                    "name=..."
                )
            if not name.isidentifier():
                raise ConfigError(
                    f"'{name}' cannot name a measure of {self.kind}s: letters, digits and _ are "
                    "expected."
                )
        super().__init__(names, {name: (2, torch.float64) for name in names})
        self.by_name = {each.name: each for each in measures}
        self.reasons: dict[str, str] = {}
        self._real: dict[str, float] = {}

    @abstractmethod
    def check_kind(self, samples: Tensor) -> None:
        """Raise a ``DataError`` unless they are samples of this kind."""

    def prepare(self, device: torch.device) -> None:
        """Read the weights of all measures in use."""
        for name in self.active:
            self.by_name[name].prepare(device)

    def look_at_real(self, samples: Tensor | None, seed: int) -> None:
        """Measure real held-out samples, for what the numbers of others may be held against.

        At most 256 are taken, by the key. Measures that read captions have none.

        Args:
            samples: uint8 pictures ``(n, C, H, W)`` or clips ``(n, C, T, H, W)``, or None.
            seed: key of the choice.
        """
        self._real = {}
        if samples is None:
            return
        chosen = samples[keyed_rows(len(samples), _MOST_REAL, seed).to(samples.device)]
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
        samples: Tensor,
        captions: Sequence[str] | None = None,
        sample_ids: Tensor | None = None,
    ) -> None:
        """Look at samples.

        Args:
            samples: uint8 pictures ``(B, 1 or 3, H, W)`` or clips ``(B, 1 or 3, T, H, W)``.
            captions: what each was to show; None for samples without captions.
            sample_ids: ``(B,)`` int64 global numbers; on one process they may be left out.

        Raises:
            DataError: they are of another kind, or captions are of another number.
        """
        self.check_kind(samples)
        if captions is not None and len(captions) != len(samples):
            raise DataError(
                f"{len(samples)} {self.kind}s came with {len(captions)} captions. Give one a "
                f"{self.kind}."
            )
        ids = self._check_ids(sample_ids, len(samples))
        rows = {}
        for name, measure in self.by_name.items():
            shape = (len(samples), len(measure.columns))
            empty = torch.full(shape, torch.nan, dtype=torch.float64)
            rows[name] = _checked(measure, samples, captions) if name in self.active else empty
        self._append(ids, len(samples), rows)

    def compute(self) -> dict[str, float]:
        """Return every active measure by name, as far as some sample has a number.

        :attr:`details` holds for each the number of samples, the spread over them, and what real
        held-out ones score.

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


def _checked(measure: SampleMeasure, samples: Tensor, captions: Sequence[str] | None) -> Tensor:
    with torch.no_grad():
        rows = measure.look(samples, captions).to("cpu", torch.float64)
    expected = (len(samples), len(measure.columns))
    if rows.shape != expected:
        raise DataError(
            f"The measure '{measure.name}' gave numbers of shape {tuple(rows.shape)}, but "
            f"{expected} was expected. Return one row a sample and one column a number it keeps."
        )
    return rows


def _without_nan(rows: Tensor) -> Tensor:
    return rows[~rows.isnan().any(dim=1)]
