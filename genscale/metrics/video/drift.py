"""Video drift error of LV-Bench: how far a long video's quality moves from that of its beginning.

LV-Bench (arXiv:2511.22973), by the rules of its program (Inferix, Apache-2.0); a mode beside the
published ones weighs late drift most and does not grow with the number of chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.metrics.protocol import Setting
from genscale.metrics.single import Combined
from genscale.metrics.video.measures import ClipMeasure

DriftWeights = Literal["linear", "log", "uniform", "late"]


def drift_weights(num_chunks: int, weights: DriftWeights) -> list[float]:
    """Return the weights of chunks 2 .. N.

    ``linear`` N - i + 1 and ``log`` ln(N - i + 1) are the published ones: they fall with time, so
    early drift counts most and, with ``log``, the last chunk not at all. ``late`` i - 1 rises.
    """
    if weights not in get_args(DriftWeights):
        raise ConfigError(
            f"weights='{weights}' is unknown. Choose one of {', '.join(get_args(DriftWeights))}."
        )
    law = {
        "linear": lambda i: float(num_chunks - i + 1),
        "log": lambda i: math.log(num_chunks - i + 1),
        "uniform": lambda i: 1.0,
        "late": lambda i: float(i - 1),
    }[weights]
    return [law(i) for i in range(2, num_chunks + 1)]


def vde(
    values: Sequence[float] | Tensor,
    weights: DriftWeights = "linear",
    normalise: bool = False,
) -> float:
    """Return the video drift error sum_{i=2..N} w_i |m_i - m_1| / m_1; lower is better.

    The baseline is the first chunk alone: a bad start lowers the error, and getting better counts
    like getting worse.

    Args:
        values: ``(N,)`` metric of each chunk, in order.
        weights: see :func:`drift_weights`; the published default is ``linear``.
        normalise: divide by the sum of the weights: the weighted mean of the relative drift, which
            does not grow with N. The published one is not divided: with N = 10 and linear
            weights, 1 % of drift in every chunk gives 0.45.

    Returns:
        0 for fewer than two chunks; infinity where the first chunk's metric is 0.

    Raises:
        ConfigError: unknown weights, or weights whose sum is 0 are to be normalised.
        DataError: the values are no finite numbers in a row.
    """
    chunks = torch.as_tensor(values, dtype=torch.float64).cpu()
    if chunks.dim() != 1 or not bool(torch.isfinite(chunks).all()):
        raise DataError(
            "A drift error reads one finite number a chunk, but got "
            f"{chunks.tolist() if chunks.numel() < 20 else tuple(chunks.shape)}. Look for chunks "
            "that have no metric."
        )
    law = torch.tensor(drift_weights(len(chunks), weights), dtype=torch.float64)
    if len(chunks) < 2:
        return 0.0
    first = float(chunks[0])
    if first == 0.0:
        return math.inf
    error = float((law * (chunks[1:] - first).abs()).sum()) / first
    if not normalise:
        return error
    if float(law.sum()) == 0.0:
        raise ConfigError(
            f"weights='{weights}' of {len(chunks)} chunks sum to 0, so nothing can be normalised. "
            "Take more chunks, or weights=late."
        )
    return error / float(law.sum())


def chunks_of(clips: Tensor, num_chunks: int) -> list[Tensor]:
    """Cut clips ``(B, C, T, H, W)`` into equal chunks along time.

    Frames that remain at the end are dropped, as the published program does; clips of fewer frames
    than chunks give none.
    """
    if num_chunks < 1:
        raise ConfigError(f"num_chunks={num_chunks} is below 1. Give a positive number.")
    length = clips.shape[2] // num_chunks
    if length == 0:
        return []
    return list(clips[:, :, : length * num_chunks].split(length, dim=2))


class VideoDrift(ClipMeasure):
    """VDE of another measure of clips, e.g. ``subject_consistency`` inside every chunk.

    The value is the published one (linear weights, not normalised), the mean over videos; the
    details hold ``late``: the mean with rising weights, normalised. Videos whose first chunk
    measures 0 have an infinite error: they are counted in ``infinite`` and left out of the mean.
    Videos with fewer frames than chunks are skipped.

    Args:
        measure: what is computed of each chunk.
        num_chunks: N, at least 2.
        name: of the metric; None: ``vde_<measure>``.

    Raises:
        ConfigError: fewer than two chunks.
    """

    columns = ("official", "late")

    def __init__(
        self, measure: ClipMeasure, *, num_chunks: int = 10, name: str | None = None
    ) -> None:
        if num_chunks < 2:
            raise ConfigError(
                f"Drift is measured between chunks, but num_chunks={num_chunks} was given. Give 2 "
                "or more."
            )
        self.measure = measure
        self.num_chunks = num_chunks
        self.name = name or f"vde_{measure.name}"
        self.resize = measure.resize
        self.reads_captions = measure.reads_captions
        self.unfit = f"no video can be cut into {num_chunks} chunks that '{measure.name}' reads"

    @property
    def description(self) -> str:
        """What is measured."""
        return f"vde of {self.measure.description}"

    @property
    def sha256(self) -> str:
        """Digest of the measure's network."""
        return self.measure.sha256

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The number of chunks, beside the measure's own settings."""
        return (*self.measure.settings, ("num_chunks", self.num_chunks), ("weights", "linear"))

    def check(self) -> list[str]:
        """Return what the measure complains of."""
        return self.measure.check()

    def prepare(self, device: torch.device) -> None:
        """Read the measure's weights."""
        self.measure.prepare(device)

    def of_clips(self, clips: Tensor, captions: Sequence[str] | None) -> Tensor:
        """Return both errors of each video."""
        rows = torch.full((len(clips), 2), torch.nan, dtype=torch.float64)
        chunks = chunks_of(clips, self.num_chunks)
        if not chunks:
            return rows
        values = [self.of_chunk(chunk, captions) for chunk in chunks]
        for i, each in enumerate(torch.stack(values, dim=1)):  # (B, N)
            if not bool(each.isnan().any()):
                official, late = vde(each), vde(each, weights="late", normalise=True)
                rows[i] = torch.tensor([official, late], dtype=torch.float64)
        return rows

    def of_chunk(self, chunk: Tensor, captions: Sequence[str] | None) -> Tensor:
        """Return the metric of one chunk of each video, ``(B,)``."""
        rows = self.measure.of_clips(chunk, captions).to("cpu", torch.float64)
        return torch.stack(
            [
                torch.tensor(torch.nan, dtype=torch.float64)
                if bool(row.isnan().any())
                else torch.tensor(self.measure.combine(row[None])[0], dtype=torch.float64)
                for row in rows
            ]
        )

    def combine(self, rows: Tensor) -> Combined:
        """Return the mean of the finite official errors; ``late`` stands in the details."""
        finite = rows[torch.isfinite(rows).all(dim=1)]
        infinite = {"infinite": float(len(rows) - len(finite))} if len(finite) < len(rows) else {}
        if not len(finite):
            raise DataError(
                f"'{self.name}' is infinite for all {len(rows)} videos, as '{self.measure.name}' "
                "is 0 in every first chunk. Leave the metric out."
            )
        return float(finite[:, 0].mean()), {"late": float(finite[:, 1].mean())} | infinite
