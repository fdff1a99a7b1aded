"""Every measure of one feature network as one torchmetrics metric: pictures in, numbers out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from genscale.errors import ConfigError, DataError, did_you_mean
from genscale.metrics.comparison import MEASURES, MeasureSettings, SetComparison
from genscale.metrics.features import FeatureNetwork
from genscale.metrics.keyed import KeyedMetric
from genscale.metrics.moments import Moments
from genscale.metrics.network_reference import SPATIAL, NetworkReference
from genscale.metrics.patches import PatchFeatures

_MOMENTS = ("count", "mean", "scatter")


class FeatureMetrics(KeyedMetric):
    """Measures of one feature network, computed from one pass over the pictures.

    Features are kept by default: duplicates can then be dropped, sets smaller than the dimension
    are compared exactly, and the numbers do not depend on the number of processes at all. Where
    memory forbids it, ``keep_features=False`` streams moments for the measures that need no more.

    Args:
        network: the feature network; its weights are read at the first pictures.
        measures: names out of :data:`genscale.metrics.comparison.MEASURES`.
        settings: numbers of the measures.
        reference: what to compare with; may be set later.
        keep_features: keep the features also where moments are enough.

    Raises:
        ConfigError: if a measure is unknown, or needs features the network does not give.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        measures: Sequence[str],
        *,
        settings: MeasureSettings | None = None,
        reference: NetworkReference | None = None,
        keep_features: bool = True,
    ) -> None:
        taps = {kind: _tap(network, kind, measures) for kind in _kinds(network, measures)}
        kept = {
            MEASURES[name].taps
            for name in measures
            if keep_features or not MEASURES[name].from_moments
        }
        # features whose length depends on the pictures (pixels) are short and always kept
        kept |= {kind for kind, tap in taps.items() if network.taps[tap] == 0 or network.per_frame}
        axes = 3 if network.per_frame else 2
        super().__init__(measures, {kind: (axes, torch.float32) for kind in taps if kind in kept})
        # held in a list: the network is not state of the metric and is moved by its owner
        self._network = [network]
        self.settings = settings or MeasureSettings()
        self.reference = reference
        self._taps = taps
        self._streamed = tuple(kind for kind in taps if kind not in kept)
        self._seen: set[int] = set()
        for kind in self._streamed:
            empty = Moments.empty(network.taps[taps[kind]])
            count = torch.zeros((), dtype=torch.int64)
            for part, value in zip(_MOMENTS, (count, empty.mean, empty.scatter), strict=True):
                self.add_state(f"{part}_{kind}", default=value, dist_reduce_fx=None)

    @property
    def network(self) -> FeatureNetwork:
        """The feature network."""
        return self._network[0]

    @property
    def reads_spatial(self) -> bool:
        """Whether a measure needs the spatial features of sFID."""
        return any(MEASURES[measure].taps == SPATIAL for measure in self.measures)

    def of_patches(self, patch: tuple[int, int]) -> FeatureMetrics:
        """Return the same measures of patches of pictures; itself if its network cuts them up."""
        network = self.network
        if network.per_frame or network.whole_clips:
            return self
        cut = PatchFeatures(network, patch, name=network.name)
        return FeatureMetrics(cut, self.measures, settings=self.settings)

    def missing(self, measure: str) -> str:
        """Return what the reference lacks for a measure, as a reason; empty if nothing."""
        needed, reference = MEASURES[measure].reference, self.reference
        if not needed:
            return ""
        if reference is None:
            return "there is no reference"
        tap = self._taps[MEASURES[measure].taps]
        if needed == "statistics" and tap not in reference.statistics:
            return f"the reference has no statistics of the features '{tap}'"
        if needed in ("features", "heldout") and reference.features is None:
            return "the reference has statistics, but no features or pictures"
        if needed == "heldout" and reference.heldout is None:
            return "the reference has no held-out pictures"
        return ""

    def update(self, images: Tensor, sample_ids: Tensor | None = None) -> None:
        """Look at pictures.

        Args:
            images: uint8 ``(B, 1 or 3, H, W)``, or clips where the network reads them.
            sample_ids: ``(B,)`` int64 global numbers; on one process they may be left out.
        """
        self.network.check_input(images)
        ids = self._check_ids(sample_ids, len(images))
        with torch.no_grad():
            output = self.network(images)
        features = {kind: output[tap] for kind, tap in self._taps.items()}
        self._append(ids, len(images), {kind: features[kind] for kind in self._rows})
        if self._streamed:
            fresh = self._fresh(ids.tolist())
            for kind in self._streamed:
                self._stream(kind, features[kind][fresh.to(features[kind].device)])

    def _fresh(self, ids: list[int]) -> Tensor:
        """Return which ids have not come before; moments cannot forget a sample again."""
        flags = []
        for each in ids:
            flags.append(each not in self._seen)
            self._seen.add(each)
        return torch.tensor(flags, dtype=torch.bool)

    def _stream(self, kind: str, features: Tensor) -> None:
        moments = self._own_moments(kind)
        moments.update(features)
        setattr(self, f"count_{kind}", torch.tensor(moments.count, device=self.device))

    def _own_moments(self, kind: str) -> Moments:
        """Return moments that share memory with the state."""
        count, mean, scatter = (getattr(self, f"{part}_{kind}") for part in _MOMENTS)
        return Moments(int(count), mean, scatter)

    def _gathered_moments(self, kind: str, num_ids: int) -> Moments:
        count, mean, scatter = (getattr(self, f"{part}_{kind}") for part in _MOMENTS)
        if mean.dim() == 1:
            moments = Moments(int(count), mean.cpu(), scatter.cpu())
        else:  # one row a process
            moments = Moments.empty(mean.shape[1])
            for row in range(len(mean)):
                part = Moments(int(count[row]), mean[row].cpu(), scatter[row].cpu())
                moments = moments.merge(part)
        if moments.count != num_ids:
            raise DataError(
                f"{moments.count} samples were streamed but only {num_ids} of them are different: "
                "processes saw the same ones. Deal ids out as rank::world, or keep features."
            )
        return moments

    def compute(self) -> dict[str, float]:
        """Return every active measure by name; :attr:`details` holds counts, spread and seconds.

        Raises:
            DataError: if there are no samples, or the reference lacks what a measure needs.
        """
        ids, features = self.collected()
        if self.network.per_frame:
            features = {kind: rows.flatten(0, 1) for kind, rows in features.items()}
        moments = {kind: self._gathered_moments(kind, len(ids)) for kind in self._streamed}
        comparison = SetComparison(
            features,
            moments,
            self.reference,
            taps=self._taps,
            network=self.network.name,
            settings=self.settings,
        )
        values, self.details = {}, {}
        for name in self.active:
            started = time.perf_counter()
            values[name], details = comparison.measure(name)
            if self.network.per_frame:
                details[self.network.set_of] = self.num_samples
            if self.num_duplicates:
                details["duplicates_dropped"] = self.num_duplicates
            details["seconds"] = round(time.perf_counter() - started, 3)
            self.details[name] = details
        return values

    def reset(self) -> None:
        """Forget the samples; the reference stays."""
        super().reset()
        self._seen = set()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Take the samples of another metric of the same kind in; the other stays as it was."""
        super().merge_state(incoming_state)
        if not isinstance(incoming_state, FeatureMetrics):
            raise DataError("Only the features of another FeatureMetrics can be merged.")
        for kind in self._streamed:
            merged = self._own_moments(kind).merge(incoming_state._own_moments(kind))
            setattr(self, f"count_{kind}", torch.tensor(merged.count, device=self.device))
            setattr(self, f"mean_{kind}", merged.mean)
            setattr(self, f"scatter_{kind}", merged.scatter)
        self._seen |= incoming_state._seen


def _kinds(network: FeatureNetwork, measures: Sequence[str]) -> list[str]:
    for name in measures:
        if name not in MEASURES:
            raise ConfigError(
                f"'{name}' is no measure of features. Known are {', '.join(MEASURES)}."
                f"{did_you_mean(name, list(MEASURES))}"
            )
        if MEASURES[name].whole_clips and not network.whole_clips:
            raise ConfigError(
                f"'{name}' compares features of whole clips, but '{network.name}' looks at "
                f"{'single frames' if network.per_frame else 'pictures'}. Use a network of clips, "
                "e.g. clip_lite, or the measure fd."
            )
    return sorted({MEASURES[name].taps for name in measures})


def _tap(network: FeatureNetwork, kind: str, measures: Sequence[str]) -> str:
    candidates = {"main": (network.tap,), "spatial": ("spatial",)}.get(
        kind, ("logits_unbiased", "logits")
    )
    for tap in candidates:
        if tap in network.taps:
            return tap
    asking = next(name for name in measures if MEASURES[name].taps == kind)
    raise ConfigError(
        f"The measure '{asking}' reads the features '{candidates[0]}', but the network "
        f"'{network.name}' gives {', '.join(network.taps)}. Use the network 'inception'."
    )
