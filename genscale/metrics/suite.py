"""The evaluation that ``evaluate.py`` and the training callback run: names in, numbers out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genscale.errors import DataError, ProtocolError
from genscale.metrics.clip_protocol import ClipProtocol
from genscale.metrics.comparison import MEASURES, MeasureSettings
from genscale.metrics.feature_metrics import FeatureMetrics
from genscale.metrics.features import FeatureNetwork, Watch, check_samples
from genscale.metrics.holders import (
    build_holders,
    feed,
    fit_judge,
    lacking,
    tell_frame_rate,
    warn_left_out,
)
from genscale.metrics.lpips import LPIPS
from genscale.metrics.names import OF_LABELS, plan_metrics
from genscale.metrics.network_reference import (
    facts_of,
    reference_from_file,
    reference_from_images,
    reference_problems,
)
from genscale.metrics.picture_measures import PictureMeasure
from genscale.metrics.protocol import EvalProtocol, MetricValue
from genscale.metrics.reference import read_reference
from genscale.metrics.reference_cache import cache_folder
from genscale.metrics.result_protocol import check_alike, clips_of, result_protocol
from genscale.metrics.single import SampleMeasure, SampleMetrics
from genscale.metrics.video.measures import ClipMeasure


class EvaluationSuite:
    """Measures sets of samples against one reference.

    A metric is named ``<measure>`` or ``<measure>_<network>``, for example ``fd_probe`` or
    ``precision``; without a network the first of ``features`` is meant, and every single pixel for
    ``copy_rate`` and ``novelty_ratio``. ``fid``, ``sfid``, ``mifid`` and ``inception_score`` always
    mean the FID Inception network, ``fvd`` and ``kvd`` I3D. Measures of labels and of captions need
    no network. Samples are pictures, or clips where the networks read those (see
    :mod:`genscale.metrics.video`).

    Samples are merged over processes by their ids; every process computes the same numbers. A
    metric that the reference or the samples do not allow (no labels, no held-out pictures) is left
    out with a warning and named in :attr:`skipped`; if none is left, that is an error.

    Args:
        metrics: names, in the order of the results.
        features: feature networks.
        clip_measures: measures of single clips, which ``metrics`` names.
        picture_measures: the same of single pictures.
        pairs: distances of a picture from its own original; runs that reconstruct or enlarge
            pictures take them, and generated samples have no such number.
        reference: a reference file (see :mod:`genscale.metrics.reference`), read before the first
            samples unless :meth:`fit_reference` was called.
        num_samples: the number of samples the protocol demands; None takes any.
        num_neighbours: k of precision, recall, density and coverage.
        kid_subset_size: rows of a KID subset, at most the number of samples.
        kid_subsets: number of KID subsets.
        num_splits: splits of the inception score.
        max_neighbour_reference: reference pictures that neighbours are sought in, at most.
        max_judge_images: pictures a judge is trained on, at most.
        max_reference: training pictures that a run is compared with, at most.
        keep_features: keep features also where moments are enough; see :class:`FeatureMetrics`.
        allow_mismatch: fields (``extractor``, ``extractor_sha256``, ``mode``) in which a statistics
            file may differ from the feature network.
        batch_size: reference pictures a pass.
        cache_reference: keep the features of reference pictures on disk, of networks whose
            weights are given; see :mod:`genscale.metrics.reference_cache`.
        seed: key of all subsets.

    Attributes:
        skipped: metrics left out of the last result, with the reason.
        seconds: time spent by task: ``reference``, ``features``, and each metric.
        protocols: protocols of all results so far, by their hash.
        watch: shows how far the features of reference pictures are; None works silently.
        patch: height and width of the patches that samples are compared by, see
            :meth:`compare_patches`; None: as they are.

    Raises:
        ConfigError: if a name is unknown or given twice, or its network is missing.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        features: Sequence[FeatureNetwork] = (),
        *,
        clip_measures: Sequence[ClipMeasure] = (),
        picture_measures: Sequence[PictureMeasure] = (),
        pairs: Sequence[LPIPS] = (),
        reference: str | None = None,
        num_samples: int | None = None,
        num_neighbours: int = 3,
        kid_subset_size: int = 1000,
        kid_subsets: int = 100,
        num_splits: int = 10,
        max_neighbour_reference: int = 10_000,
        max_judge_images: int = 10_000,
        max_reference: int = 50_000,
        keep_features: bool = True,
        allow_mismatch: Sequence[str] = (),
        batch_size: int = 256,
        cache_reference: bool = False,
        seed: int = 0,
    ) -> None:
        self.metrics = tuple(metrics)
        self.pairs = tuple(pairs)
        self.reference = reference
        self.num_samples = num_samples
        self.allow_mismatch = tuple(allow_mismatch)
        self.max_reference = max_reference
        self.batch_size = batch_size
        self.cache_reference = cache_reference
        self.skipped: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.protocols: dict[str, EvalProtocol] = {}
        self.watch: Watch | None = None
        self.patch: tuple[int, int] | None = None
        self._settings = MeasureSettings(
            num_neighbours=num_neighbours,
            kid_subset_size=kid_subset_size,
            kid_subsets=kid_subsets,
            num_splits=num_splits,
            max_neighbour_reference=max_neighbour_reference,
            seed=seed,
        )
        self._plan = plan_metrics(
            self.metrics,
            [network.name for network in features],
            [measure.name for measure in clip_measures],
            [measure.name for measure in picture_measures],
        )
        self._reasons: dict[str, str] = {}  # metrics that the reference does not allow
        self._holders = build_holders(
            {name: self._measures_of(name) for name in (each.network for each in self._plan)},
            features,
            clip_measures,
            picture_measures,
            settings=self._settings,
            keep_features=keep_features,
            max_judge_images=max_judge_images,
        )
        self._warned: set[str] = set()
        self._reference_facts: dict[str, Any] | None = None
        self._clips: ClipProtocol | None = None  # of the reference, or of the samples
        self._device = torch.device("cpu")

    def _measures_of(self, network: str) -> list[str]:
        measures = [
            planned.measure
            for planned in self._plan
            if planned.network == network and planned.name not in self._reasons
        ]
        return list(dict.fromkeys(measures))

    @property
    def _by_features(self) -> list[FeatureMetrics]:
        return [each for each in self._holders.values() if isinstance(each, FeatureMetrics)]

    @property
    def networks(self) -> list[FeatureNetwork]:
        """The feature networks in use."""
        return [metric.network for metric in self._by_features]

    @property
    def single_measures(self) -> list[SampleMeasure]:
        """The measures of single samples in use."""
        return [each for holder in self._of_single for each in holder.by_name.values()]

    def to(self, device: torch.device | str) -> EvaluationSuite:
        """Choose where feature networks run; returns the suite."""
        self._device = torch.device(device)
        return self

    def check(self, num_samples: int | None = None) -> list[str]:
        """Return a sentence for everything that would fail later; no file is read.

        Args:
            num_samples: how many samples are going to be evaluated, if that is known.
        """
        problems = [sentence for network in self.networks for sentence in network.check()]
        problems += [each for measure in self.single_measures for each in measure.check()]
        problems = list(dict.fromkeys(problems))
        if None not in (num_samples, self.num_samples) and num_samples != self.num_samples:
            problems.append(self._wrong_count(int(num_samples or 0)))
        return problems + reference_problems(self.reference, self.max_reference)

    def compare_patches(self, patch: tuple[int, int]) -> None:
        """Compare samples with smaller real pictures from now on: patches of the reference's size.

        To be called before there is a reference. Every feature network looks at patches then, and
        says so in its protocols. The judge of labels looks at whole samples, averaged to the size
        of the data; measures of captions and of single samples stay as they are.

        Args:
            patch: height and width of the real pictures.
        """
        self.patch = patch
        for name, holder in self._holders.items():
            if isinstance(holder, FeatureMetrics):
                self._holders[name] = holder.of_patches(patch)

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
        clips: ClipProtocol | None = None,
    ) -> None:
        """Take real pictures as the reference: the training split, compared with held-out ones.

        Args:
            train_images: uint8 ``(n, C, H, W)``, or clips ``(n, C, T, H, W)``.
            train_labels: ``(n,)`` int64, or None without labels.
            heldout_images: uint8 ``(m, C, H, W)``, or clips, or None; they give the floor of
                distances and the yardstick of novelty.
            heldout_labels: ``(m,)`` int64, or None.
            fingerprint: digest of the data.
            name: name of the data set.
            split: which split ``train_images`` are.
            crop: how pictures were brought to size.
            clips: what protocols say of clips; None: their number of frames and their size.

        Raises:
            DataError: if no metric can be computed with these pictures.
        """
        started = time.perf_counter()
        self._reasons = {}
        self._clips = clips or clips_of(check_samples(train_images))
        for metric in self._by_features:
            if self._fit(metric, train_images, train_labels, fingerprint):
                # pixels are read faster than features, and probes differ with the data
                learned = any(True for _ in metric.network.parameters())
                slow = learned or self._clips is not None
                cached = self.cache_reference and learned and not metric.network.learns_from_labels
                metric.reference = reference_from_images(
                    metric.network,
                    train_images,
                    heldout_images,
                    spatial=metric.reads_spatial,
                    batch_size=self.batch_size,
                    cache=cache_folder() if cached else None,
                    watch=self.watch if slow else None,
                )
        self._fit_judge((train_images, train_labels), (heldout_images, heldout_labels))
        self._choose_active()
        self._prepare_single(heldout_images)
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

        Statistics serve the network they were made with; other networks and measures that need
        features read the file's pictures.

        Raises:
            DataError: if the file is damaged, or no metric can be computed with it.
            ProtocolError: if its statistics were made with another network or resizing.
        """
        started = time.perf_counter()
        found = read_reference(path)
        self._reasons = {}
        for metric in self._by_features:
            if self._fit(metric, found.images, found.labels, found.sha256):
                metric.reference = reference_from_file(
                    metric.network,
                    found,
                    spatial=metric.reads_spatial,
                    features=any(
                        MEASURES[measure].reference in ("features", "heldout")
                        for measure in metric.measures
                    ),
                    ignore=self.allow_mismatch,
                    batch_size=self.batch_size,
                )
        self._fit_judge((found.images, found.labels), (None, None))
        self._choose_active()
        self._clips = None if found.images is None else clips_of(found.images)
        self._prepare_single(None)
        self._reference_facts = facts_of(found)
        self.seconds["reference"] = time.perf_counter() - started

    def _fit(
        self, metric: FeatureMetrics, images: Tensor | None, labels: Tensor | None, digest: str
    ) -> bool:
        """Make a network ready; False where it would learn from labels that are not there."""
        network = metric.network
        metric.reference = None
        if network.learns_from_labels and (images is None or labels is None):
            self._rule_out(
                network.name, f"'{network.name}' learns from labels and the reference has none"
            )
            return False
        if images is not None:
            network.fit(images, labels, digest)
        self._prepare(network)
        return True

    def _prepare(self, network: FeatureNetwork) -> None:
        network.prepare()
        network.to(self._device)

    @property
    def _of_single(self) -> list[SampleMetrics]:
        return [each for each in self._holders.values() if isinstance(each, SampleMetrics)]

    def _prepare_single(self, heldout: Tensor | None) -> None:
        for holder in self._of_single:
            holder.prepare(self._device)
            holder.look_at_real(heldout, self._settings.seed)

    def _fit_judge(
        self, train: tuple[Tensor | None, Tensor | None], heldout: tuple[Tensor | None, ...]
    ) -> None:
        holder = self._holders.get(OF_LABELS)
        if holder is not None:
            for measure, reason in fit_judge(holder, train, heldout, self.patch).items():
                self._rule_out(OF_LABELS, reason, only=measure)

    def _rule_out(self, network: str, reason: str, *, only: str = "") -> None:
        for planned in self._plan:
            if planned.network == network and only in ("", planned.measure):
                self._reasons[planned.name] = reason

    def _choose_active(self) -> None:
        """Settle before any sample is seen which metrics the reference allows.

        Raises:
            DataError: if none is left.
        """
        for planned in self._plan:
            holder = self._holders[planned.network]
            if isinstance(holder, FeatureMetrics) and planned.name not in self._reasons:
                missing = holder.missing(planned.measure)
                if missing:
                    self._reasons[planned.name] = missing
        if self._plan and len(self._reasons) == len(self._plan):
            name, reason = next(iter(self._reasons.items()))
            raise DataError(
                f"No metric can be computed with this reference: not '{name}', because {reason}. "
                "Give a reference with pictures, labels and a held-out split, or other metrics."
            )
        for network, holder in self._holders.items():
            holder.active = tuple(self._measures_of(network))

    def update(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        sample_ids: Tensor | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        """Look at samples.

        Args:
            images: uint8 ``(B, C, H, W)``, or clips ``(B, C, T, H, W)``, on any device.
            labels: ``(B,)`` int64 that the samples were generated for, or None.
            sample_ids: ``(B,)`` int64 global numbers; on one process they may be left out.
            captions: B captions that the samples were generated for, or None.

        Raises:
            ConfigError: if a metric cannot read a caption.
            DataError: if the pictures are not 8-bit, are clips where the metrics read pictures or
                the other way round, or there is no reference.
        """
        check_samples(images)
        self._require_reference()
        self._clips = self._clips or clips_of(images)
        check_alike(images, self._clips, self.networks)
        started = time.perf_counter()
        for holder in self._holders.values():
            if holder.active:
                feed(holder, images, labels, captions, sample_ids, device=self._device)
        spent = time.perf_counter() - started
        self.seconds["features"] = self.seconds.get("features", 0.0) + spent

    def _require_reference(self) -> None:
        if self._reference_facts is not None:
            return
        if self.reference is not None:
            self.read_reference(self.reference)
            return
        for planned in self._plan:
            if planned.has_reference:
                raise DataError(
                    f"metric '{planned.name}' compares samples with real pictures, but no "
                    "reference was given. Call fit_reference, or set metrics.reference to a file."
                )
        for network in self.networks:  # an inception score compares with nothing
            self._prepare(network)
        self._prepare_single(None)
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
        self._require_reference()  # a process without samples of its own still takes part
        tell_frame_rate(self._holders.values(), protocol)
        values = {
            network: holder.compute() for network, holder in self._holders.items() if holder.active
        }
        self._check_count()
        results = []
        self.skipped = dict(self._reasons)
        self.skipped |= {each.name: "generated samples have no originals" for each in self.pairs}
        for planned in self._plan:
            if planned.name in self.skipped:
                continue
            holder = self._holders[planned.network]
            if planned.measure not in values[planned.network]:
                self.skipped[planned.name] = lacking(holder, planned, values[planned.network])
                continue
            made_under = result_protocol(
                planned,
                holder,
                protocol or EvalProtocol(),
                settings=self._settings,
                reference=self._reference_facts or {},
                clips=self._clips,
            )
            self.protocols[made_under.digest] = made_under
            details = holder.details[planned.measure]
            self.seconds[planned.name] = details["seconds"]
            value = values[planned.network][planned.measure]
            results.append(MetricValue(planned.name, value, made_under.digest, details, made_under))
        warn_left_out(self.skipped, self._warned)
        if self._plan and not results:
            name, reason = next(iter(self.skipped.items()))
            raise DataError(
                f"No metric can be computed with these samples: not '{name}', because {reason}. "
                "Take data that have them, or other metrics."
            )
        return results

    def _check_count(self) -> None:
        counts = {holder.num_samples for holder in self._holders.values() if holder.active}
        if self.num_samples is not None and counts - {self.num_samples}:
            raise ProtocolError(self._wrong_count(max(counts)))

    def _wrong_count(self, count: int) -> str:
        return (
            f"The metrics demand {self.num_samples} samples, but {count} different ones were "
            f"given. Generate num_samples={self.num_samples}, or set metrics.num_samples=null."
        )

    def reset(self) -> None:
        """Forget the samples; reference and networks stay."""
        for holder in self._holders.values():
            holder.reset()
        self.seconds = {name: t for name, t in self.seconds.items() if name == "reference"}

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
        for network, holder in self._holders.items():
            holder.merge_state(other._holders[network])
