"""The evaluation that ``evaluate.py`` and the training callback run: names in, numbers out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genscale.errors import DataError, ProtocolError
from genscale.metrics.agreement import Judge
from genscale.metrics.comparison import MEASURES, MeasureSettings, NetworkReference, settings_of
from genscale.metrics.feature_metrics import FeatureMetrics
from genscale.metrics.features import FeatureNetwork, check_images, extract
from genscale.metrics.label_metrics import LabelMetrics
from genscale.metrics.moments import Moments
from genscale.metrics.names import EVERY_PIXEL, PlannedMetric, plan_metrics
from genscale.metrics.pixels import Pixels
from genscale.metrics.protocol import EvalProtocol, MetricValue
from genscale.metrics.reference import (
    GaussianStatistics,
    ReferenceFile,
    read_reference,
    require_compatible,
)

_UNLABELLED = "the samples have no labels"


class EvaluationSuite:
    """Measures sets of samples against one reference.

    A metric is named ``<measure>`` or ``<measure>_<network>``, for example ``fd_probe`` or
    ``precision``; without a network the first of ``features`` is meant, and every single pixel for
    ``copy_rate`` and ``novelty_ratio``. ``fid``, ``sfid``, ``mifid`` and ``inception_score`` always
    mean the FID Inception network. Measures of labels need no network.

    Samples are merged over processes by their ids; every process computes the same numbers.

    Args:
        metrics: names, in the order of the results.
        features: feature networks.
        reference: a reference file (see :mod:`genscale.metrics.reference`), read before the first
            samples unless :meth:`fit_reference` was called.
        num_samples: the number of samples the protocol demands; None takes any.
        num_neighbours: k of precision, recall, density and coverage.
        kid_subset_size: rows of a KID subset, at most the number of samples.
        kid_subsets: number of KID subsets.
        num_splits: splits of the inception score.
        max_neighbour_reference: reference pictures that neighbours are sought in, at most.
        max_judge_images: pictures a judge is trained on, at most.
        keep_features: keep features also where moments are enough; see :class:`FeatureMetrics`.
        allow_mismatch: fields (``extractor``, ``extractor_sha256``, ``mode``) in which a statistics
            file may differ from the feature network.
        batch_size: reference pictures a pass.
        seed: key of all subsets.

    Attributes:
        skipped: metrics left out of the last result, with the reason.
        seconds: time spent by task: ``reference``, ``features``, and each metric.
        protocols: protocols of all results so far, by their hash.

    Raises:
        ConfigError: if a name is unknown or given twice, or its network is missing.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        features: Sequence[FeatureNetwork] = (),
        *,
        reference: str | None = None,
        num_samples: int | None = None,
        num_neighbours: int = 3,
        kid_subset_size: int = 1000,
        kid_subsets: int = 100,
        num_splits: int = 10,
        max_neighbour_reference: int = 10_000,
        max_judge_images: int = 10_000,
        keep_features: bool = True,
        allow_mismatch: Sequence[str] = (),
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        self.metrics = tuple(metrics)
        self.reference = reference
        self.num_samples = num_samples
        self.allow_mismatch = tuple(allow_mismatch)
        self.batch_size = batch_size
        self.skipped: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.protocols: dict[str, EvalProtocol] = {}
        self._settings = MeasureSettings(
            num_neighbours=num_neighbours,
            kid_subset_size=kid_subset_size,
            kid_subsets=kid_subsets,
            num_splits=num_splits,
            max_neighbour_reference=max_neighbour_reference,
            seed=seed,
        )
        self._plan = plan_metrics(self.metrics, [network.name for network in features])
        networks = [*features, Pixels(None, name=EVERY_PIXEL)]
        self._by_features = {
            network.name: FeatureMetrics(
                network, measures, settings=self._settings, keep_features=keep_features
            )
            for network in networks
            if (measures := self._measures_of(network.name))
        }
        labels = self._measures_of("")
        self._by_labels = (
            LabelMetrics(labels, max_images=max_judge_images, seed=seed) if labels else None
        )
        self._reference_facts: dict[str, Any] | None = None
        self._device = torch.device("cpu")

    def _measures_of(self, network: str) -> list[str]:
        measures = [planned.measure for planned in self._plan if planned.network == network]
        return list(dict.fromkeys(measures))

    @property
    def networks(self) -> list[FeatureNetwork]:
        """The feature networks in use."""
        return [metric.network for metric in self._by_features.values()]

    def to(self, device: torch.device | str) -> EvaluationSuite:
        """Choose where feature networks run; returns the suite."""
        self._device = torch.device(device)
        return self

    def check(self) -> list[str]:
        """Return a sentence for every file or package that is missing; nothing is read."""
        problems = [sentence for network in self.networks for sentence in network.check()]
        if self.reference is not None and not Path(self.reference).expanduser().is_file():
            problems.append(
                f"No reference at {self.reference}. Give an existing npz, pkl or safetensors file."
            )
        return problems

    # reference ------------------------------------------------------------------------------

    @property
    def has_reference(self) -> bool:
        """Whether a reference has been fitted or read."""
        return self._reference_facts is not None

    def fit_reference(
        self,
        train_images: Tensor,
        train_labels: Tensor | None,
        heldout_images: Tensor | None,
        heldout_labels: Tensor | None,
        fingerprint: str,
        *,
        name: str = "data",
        split: str = "train",
        crop: str = "",
    ) -> None:
        """Take real pictures as the reference: the training split, compared with held-out ones.

        Args:
            train_images: uint8 ``(n, C, H, W)``.
            train_labels: ``(n,)`` int64, or None without labels.
            heldout_images: uint8 ``(m, C, H, W)``, or None; they give the floor of distances and
                the yardstick of novelty.
            heldout_labels: ``(m,)`` int64, or None.
            fingerprint: digest of the data.
            name: name of the data set.
            split: which split ``train_images`` are.
            crop: how pictures were brought to size.

        Raises:
            DataError: if a metric needs labels or held-out pictures that are not there.
        """
        started = time.perf_counter()
        for metric in self._by_features.values():
            self._prepare(metric.network, train_images, train_labels, fingerprint)
            features, statistics = self._describe(metric, train_images)
            heldout = None
            if heldout_images is not None:
                heldout = self._extract(metric.network, heldout_images)[metric.network.tap]
            metric.reference = NetworkReference(statistics, features=features, heldout=heldout)
        self._check_reference()
        if self._by_labels is not None and train_labels is not None:
            self._by_labels.fit_judge(train_images, train_labels, heldout_images, heldout_labels)
        self._reference_facts = {
            "reference": name,
            "reference_sha256": fingerprint,
            "reference_split": split,
            "reference_crop": crop,
            "reference_count": len(train_images),
        }
        self.seconds["reference"] = time.perf_counter() - started

    def read_reference(self, path: Path | str) -> None:
        """Take a file as the reference: statistics, pictures, or both.

        Statistics serve the network they were made with; every other network and every measure
        that needs features reads the file's pictures.

        Raises:
            DataError: if the file is damaged, or lacks what a metric needs.
            ProtocolError: if its statistics were made with another network or resizing.
        """
        started = time.perf_counter()
        found = read_reference(path)
        for metric in self._by_features.values():
            self._prepare(metric.network, found.images, found.labels, found.sha256)
            metric.reference = self._reference_from(found, metric)
        self._check_reference()
        if self._by_labels is not None and found.images is not None and found.labels is not None:
            self._by_labels.fit_judge(found.images, found.labels, None, None)
        origin = found.origin
        counted = found.statistics.get("mu")
        self._reference_facts = {
            "reference": found.name,
            "reference_sha256": found.sha256,
            "reference_split": origin.split if origin else "",
            "reference_crop": origin.crop if origin else "",
            "reference_count": counted.count if counted else _length(found.images),
        }
        self.seconds["reference"] = time.perf_counter() - started

    def _prepare(
        self,
        network: FeatureNetwork,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        fingerprint: str = "",
    ) -> None:
        if images is not None:
            network.fit(images, labels, fingerprint)
        network.prepare()
        network.to(self._device)

    def _extract(self, network: FeatureNetwork, images: Tensor) -> dict[str, Tensor]:
        taps = tuple(tap for tap in (network.tap, "spatial") if tap in network.taps)
        return extract(network, images, taps, batch_size=self.batch_size)

    def _describe(
        self, metric: FeatureMetrics, images: Tensor
    ) -> tuple[Tensor, dict[str, GaussianStatistics]]:
        """Return main features and statistics of reference pictures."""
        features = self._extract(metric.network, images)
        kinds = {MEASURES[measure].taps for measure in metric.measures}
        taps = [metric.network.tap, *(["spatial"] if "spatial" in kinds else [])]
        statistics = {tap: GaussianStatistics.of(Moments.of(features[tap])) for tap in taps}
        return features[metric.network.tap], statistics

    def _reference_from(self, found: ReferenceFile, metric: FeatureMetrics) -> NetworkReference:
        network = metric.network
        own = found.origin is not None and found.origin.extractor == network.description
        if found.statistics and (own or found.images is None):
            require_compatible(found, network, ignore=self.allow_mismatch)
            taps = {"mu": network.tap, "mu_s": "spatial"}
            statistics = {
                taps[kind]: value for kind, value in found.statistics.items() if kind in taps
            }
            features = found.features
            needed = {MEASURES[measure].reference for measure in metric.measures}
            if features is None and found.images is not None and needed & {"features", "heldout"}:
                features = self._extract(network, found.images)[network.tap]
            return NetworkReference(statistics, features=features)
        if found.images is None:
            raise DataError(
                f"The reference {found.name} holds neither statistics nor pictures for the "
                f"network '{network.name}'. Give another file."
            )
        features, statistics = self._describe(metric, found.images)
        return NetworkReference(statistics, features=features)

    def _check_reference(self) -> None:
        """Raise now, not after the samples, if the reference lacks what a measure needs."""
        for planned in self._plan:
            if not planned.network or not MEASURES[planned.measure].reference:
                continue
            reference = self._by_features[planned.network].reference
            offered = {
                "statistics": reference is not None,
                "features": reference is not None and reference.features is not None,
                "heldout": reference is not None and reference.heldout is not None,
            }
            needed = MEASURES[planned.measure].reference
            if not offered[needed]:
                raise DataError(
                    f"metric '{planned.name}' needs {needed} of the reference, which has "
                    f"{', '.join(name for name, there in offered.items() if there) or 'none'}. "
                    "Give pictures with a held-out split, or leave the metric out."
                )

    # samples --------------------------------------------------------------------------------

    def update(
        self, images: Tensor, labels: Tensor | None = None, sample_ids: Tensor | None = None
    ) -> None:
        """Look at samples.

        Args:
            images: uint8 ``(B, C, H, W)``, on any device.
            labels: ``(B,)`` int64 that the samples were generated for, or None.
            sample_ids: ``(B,)`` int64 global numbers; on one process they may be left out.

        Raises:
            DataError: if the pictures are not 8-bit, or there is no reference.
        """
        check_images(images)
        self._require_ready()
        started = time.perf_counter()
        for metric in self._by_features.values():
            metric.update(images.to(self._device), sample_ids)
        if self._by_labels is not None:
            self._by_labels.update(images.cpu(), labels, sample_ids)
        spent = time.perf_counter() - started
        self.seconds["features"] = self.seconds.get("features", 0.0) + spent

    def _require_ready(self) -> None:
        if self._reference_facts is not None:
            return
        if self.reference is not None:
            self.read_reference(self.reference)
            return
        needing = [
            planned.name
            for planned in self._plan
            if not planned.network or MEASURES[planned.measure].reference
        ]
        if needing:
            raise DataError(
                f"metric '{needing[0]}' compares samples with real pictures, but no reference was "
                "given. Call fit_reference, or set metrics.reference to a file."
            )
        for network in self.networks:
            self._prepare(network)
        self._reference_facts = {}

    def compute(self, protocol: EvalProtocol | None = None) -> list[MetricValue]:
        """Return every metric in the order asked for, each under its own protocol.

        Args:
            protocol: how the samples were made; what concerns features, reference and counts is
                filled in here.

        Raises:
            DataError: if there are no samples.
            ProtocolError: if :attr:`num_samples` were demanded and another number came.
        """
        values: dict[str, dict[str, float]] = {
            name: metric.compute() for name, metric in self._by_features.items()
        }
        if self._by_labels is not None:
            values[""] = self._by_labels.compute()
        self._check_count()
        results = []
        self.skipped = {}
        for planned in self._plan:
            if planned.measure not in values[planned.network]:
                self._skip(planned.name, _UNLABELLED)
                continue
            made_under = self._protocol_of(planned, protocol or EvalProtocol())
            self.protocols[made_under.digest] = made_under
            details = self._holder(planned).details[planned.measure]
            self.seconds[planned.name] = details["seconds"]
            value = values[planned.network][planned.measure]
            results.append(MetricValue(planned.name, value, made_under.digest, details, made_under))
        return results

    def _holder(self, planned: PlannedMetric) -> FeatureMetrics | LabelMetrics:
        if planned.network:
            return self._by_features[planned.network]
        if self._by_labels is None:
            raise DataError(f"metric '{planned.name}' was not planned.")
        return self._by_labels

    def _check_count(self) -> None:
        holders = [*self._by_features.values(), *([self._by_labels] if self._by_labels else [])]
        counts = {holder.num_samples for holder in holders}
        if self.num_samples is not None and counts - {self.num_samples}:
            raise ProtocolError(
                f"The protocol demands {self.num_samples} samples, but {max(counts)} different "
                f"ones were given. Generate num_samples={self.num_samples}, or set "
                "metrics.num_samples=null."
            )

    def _skip(self, name: str, reason: str) -> None:
        self.skipped[name] = reason
        warnings.warn(f"metric '{name}' is left out: {reason}.", stacklevel=3)

    def _protocol_of(self, planned: PlannedMetric, base: EvalProtocol) -> EvalProtocol:
        holder = self._holder(planned)
        facts: dict[str, Any] = {"num_samples": holder.num_samples}
        if isinstance(holder, FeatureMetrics):
            network = holder.network
            facts |= {
                "features": network.description,
                "features_sha256": network.sha256,
                "resize": network.resize,
                "settings": settings_of(planned.measure, self._settings),
            }
            if MEASURES[planned.measure].reference:
                facts |= self._reference_facts or {}
        else:
            facts |= {
                "features": Judge.description,
                "resize": "none",
                "settings": (("max_images", holder.max_images), ("seed", holder.seed)),
                **(self._reference_facts or {}),
            }
        return base.replace(**facts)

    def reset(self) -> None:
        """Forget the samples; reference and networks stay."""
        for metric in self._by_features.values():
            metric.reset()
        if self._by_labels is not None:
            self._by_labels.reset()
        self.seconds = {name: self.seconds[name] for name in self.seconds if name == "reference"}

    def merge(self, other: EvaluationSuite) -> None:
        """Take the samples of a suite with the same metrics in; the other stays as it was.

        Raises:
            DataError: if the other suite has other metrics.
        """
        if other.metrics != self.metrics:
            raise DataError(
                f"A suite of {', '.join(self.metrics)} cannot take in one of "
                f"{', '.join(other.metrics)}. Build both with the same metrics."
            )
        for name, metric in self._by_features.items():
            metric.merge_state(other._by_features[name])
        if self._by_labels is not None and other._by_labels is not None:
            self._by_labels.merge_state(other._by_labels)


def _length(images: Tensor | None) -> int:
    return 0 if images is None else len(images)
