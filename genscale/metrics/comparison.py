"""Samples against a reference through one feature network: every measure, shared work done once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from genscale.errors import DataError
from genscale.metrics.frechet import (
    FrechetResult,
    compare_features,
    compare_gaussians,
    frechet_infinity,
)
from genscale.metrics.inception_score import inception_score
from genscale.metrics.kid import KernelDistance, cmmd, kernel_distance, kernel_distance_full
from genscale.metrics.moments import Moments
from genscale.metrics.network_reference import NetworkReference
from genscale.metrics.novelty import (
    Novelty,
    memorization_distance,
    memorization_informed,
    nearest_distances,
    novelty,
)
from genscale.metrics.prdc import FidelityDiversity, fidelity_diversity
from genscale.metrics.protocol import Setting
from genscale.metrics.reference import GaussianStatistics
from genscale.metrics.subsets import keyed_rows
from genscale.metrics.video.distances import frechet_video, kernel_video

Measured = tuple[float, dict[str, Any]]

_WARNED: set[tuple[str, int]] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureSettings:
    """Numbers that belong to measures; each becomes part of the protocol of those that use it.

    Attributes:
        num_neighbours: k of precision, recall, density and coverage.
        strict: their balls are open (<) instead of closed (<=).
        kid_subset_size: rows of a KID subset, at most the number of samples.
        kid_subsets: number of KID subsets.
        num_splits: splits of the inception score.
        max_neighbour_reference: reference pictures that neighbours are sought in, at most.
        max_heldout: held-out pictures that novelty is measured against, at most.
        seed: key of all subsets.
    """

    num_neighbours: int = 3
    strict: bool = False
    kid_subset_size: int = 1000
    kid_subsets: int = 100
    num_splits: int = 10
    max_neighbour_reference: int = 10_000
    max_heldout: int = 2_000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure on feature sets.

    Attributes:
        taps: which features it reads: ``main``, ``spatial`` or ``logits``.
        from_moments: moments of the samples are enough.
        reference: what the reference must offer: ``statistics``, ``features``, ``heldout`` or
            nothing.
        settings: fields of :class:`MeasureSettings` that change it.
        whole_clips: it is a measure of networks that see a clip as a whole.
        covariance: ``unbiased`` or ``biased``.
    """

    taps: str = "main"
    from_moments: bool = False
    reference: str = "features"
    settings: tuple[str, ...] = ()
    whole_clips: bool = False
    covariance: str = "unbiased"


_NEIGHBOURS = ("num_neighbours", "strict", "max_neighbour_reference", "seed")
_NOVELTY = ("max_heldout", "seed")

MEASURES: dict[str, Measure] = {
    "fd": Measure(from_moments=True, reference="statistics"),
    "sfd": Measure(taps="spatial", from_moments=True, reference="statistics"),
    "fd_infinity": Measure(reference="statistics", settings=("seed",)),
    "kid": Measure(settings=("kid_subset_size", "kid_subsets", "seed")),
    "kid_full": Measure(),
    "cmmd": Measure(),
    "precision": Measure(settings=_NEIGHBOURS),
    "recall": Measure(settings=_NEIGHBOURS),
    "density": Measure(settings=_NEIGHBOURS),
    "coverage": Measure(settings=_NEIGHBOURS),
    "inception_score": Measure(taps="logits", reference="", settings=("num_splits",)),
    "copy_rate": Measure(reference="heldout", settings=_NOVELTY),
    "novelty_ratio": Measure(reference="heldout", settings=_NOVELTY),
    "mifid": Measure(),
    "fvd": Measure(whole_clips=True, covariance="biased"),
    "fvd_unbiased": Measure(whole_clips=True),
    "kvd": Measure(whole_clips=True),
}


def settings_of(measure: str, settings: MeasureSettings) -> tuple[Setting, ...]:
    """Return the settings that change a measure, for its protocol."""
    return tuple((name, getattr(settings, name)) for name in MEASURES[measure].settings)


class SetComparison:
    """One set of samples against one reference.

    Args:
        features: ``(n, d)`` features of the samples by kind (``main``, ``spatial``, ``logits``), in
            order of their ids.
        moments: moments by kind where features were not kept.
        reference: the reference; None suits measures that need none.
        taps: name of the network's tap of each kind.
        network: name of the feature network, for messages.
        settings: numbers of the measures.
    """

    def __init__(
        self,
        features: dict[str, Tensor],
        moments: dict[str, Moments],
        reference: NetworkReference | None,
        *,
        taps: dict[str, str],
        network: str,
        settings: MeasureSettings,
    ) -> None:
        self.features = features
        self.moments = moments
        self._reference = reference
        self.taps = taps
        self.network = network
        self.settings = settings

    def measure(self, name: str) -> Measured:
        """Return the value and the details of a measure of :data:`MEASURES`."""
        method: Callable[[], Measured] = getattr(self, f"_{name}")
        return method()

    @property
    def reference(self) -> NetworkReference:
        """The reference, which must be there."""
        if self._reference is None:
            raise DataError(
                f"The features of '{self.network}' have no reference to be compared with. "
                "Call fit_reference or read_reference first."
            )
        return self._reference

    @property
    def _reference_features(self) -> Tensor:
        if self.reference.features is None:
            raise DataError(
                f"The reference holds statistics but no features of '{self.network}', which KID "
                "and neighbours need. Give a reference with pictures (arr_0) or features."
            )
        return self.reference.features

    def _statistics(self, kind: str) -> GaussianStatistics:
        tap = self.taps[kind]
        if tap not in self.reference.statistics:
            raise DataError(
                f"The reference holds no statistics of the features '{tap}' of '{self.network}'. "
                "Give a reference file that has them."
            )
        return self.reference.statistics[tap]

    def _frechet(self, kind: str) -> tuple[FrechetResult, int]:
        statistics = self._statistics(kind)
        dim = len(statistics.mean)
        if kind in self.features:
            samples = self.features[kind]
            count = len(samples)
            stored = self.reference.features if kind == "main" else None
            if stored is not None and min(count, len(stored)) <= dim:
                return compare_features(samples, stored), count
            moments = Moments.of(samples)
        else:
            moments = self.moments[kind]
            count = moments.count
        result = compare_gaussians(
            moments.mean, moments.covariance(), statistics.mean, statistics.covariance
        )
        return result, count

    def _frechet_value(self, kind: str) -> Measured:
        result, count = self._frechet(kind)
        statistics = self._statistics(kind)
        dim = len(statistics.mean)
        _warn_small(self.network, count, dim)
        return result.value, {
            "n": count,
            "reference_n": statistics.count or None,
            "dimensions": dim,
            "mean_term": result.mean_term,
            "covariance_term": result.covariance_term,
            "route": result.route,
        }

    def _fd(self) -> Measured:
        value, details = self._frechet_value("main")
        floor = self.reference.frechet_floor(details["n"], self.settings.seed)
        if floor is not None:
            details |= {"floor": floor[0], "floor_n": floor[1]}
        return value, details

    def _sfd(self) -> Measured:
        return self._frechet_value("spatial")

    def _fd_infinity(self) -> Measured:
        statistics = self._statistics("main")
        samples = self.features["main"]
        line = frechet_infinity(
            samples, statistics.mean, statistics.covariance, seed=self.settings.seed
        )
        return line.value, {"n": len(samples), "slope": line.slope, "sizes": list(line.sizes)}

    @cached_property
    def _kernel(self) -> KernelDistance:
        return self._kernel_to_reference(self.features["main"])

    def _kernel_to_reference(self, features: Tensor) -> KernelDistance:
        return kernel_distance(
            features,
            self._reference_features,
            subset_size=self.settings.kid_subset_size,
            num_subsets=self.settings.kid_subsets,
            seed=self.settings.seed,
        )

    def _kid(self) -> Measured:
        result = self._kernel
        return result.mean, {
            **self._counts(),
            "std": result.std,
            "subset_size": result.subset_size,
        }

    def _kid_full(self) -> Measured:
        value = kernel_distance_full(self.features["main"], self._reference_features)
        return value, self._counts()

    def _cmmd(self) -> Measured:
        return cmmd(self.features["main"], self._reference_features), self._counts()

    @cached_property
    def _neighbours(self) -> tuple[FidelityDiversity, int]:
        limit = self.settings.max_neighbour_reference
        real = self._reference_features
        real = real[keyed_rows(len(real), limit, self.settings.seed)]
        result = fidelity_diversity(
            real,
            self.features["main"],
            num_neighbours=self.settings.num_neighbours,
            strict=self.settings.strict,
        )
        return result, len(real)

    def _neighbour_value(self, name: str) -> Measured:
        result, count = self._neighbours
        return getattr(result, name), {"n": len(self.features["main"]), "reference_n": count}

    def _precision(self) -> Measured:
        return self._neighbour_value("precision")

    def _recall(self) -> Measured:
        return self._neighbour_value("recall")

    def _density(self) -> Measured:
        return self._neighbour_value("density")

    def _coverage(self) -> Measured:
        return self._neighbour_value("coverage")

    def _inception_score(self) -> Measured:
        logits = self.features["logits"]
        splits = min(self.settings.num_splits, len(logits))
        score = inception_score(logits, num_splits=splits)
        return score.mean, {"n": len(logits), "std": score.std, "splits": splits}

    @cached_property
    def _novelty(self) -> tuple[Novelty, int]:
        settings = self.settings
        heldout = self.reference.heldout_distances(settings.max_heldout, settings.seed)
        own = nearest_distances(self.features["main"], self._reference_features)
        return novelty(own, heldout), len(heldout)

    def _novelty_details(self) -> dict[str, Any]:
        result, count = self._novelty
        return {
            **self._counts(),
            "median": result.median,
            "heldout_median": result.heldout_median,
            "threshold": result.threshold,
            "heldout_n": count,
        }

    def _copy_rate(self) -> Measured:
        return self._novelty[0].copy_rate, self._novelty_details()

    def _novelty_ratio(self) -> Measured:
        return self._novelty[0].ratio, self._novelty_details()

    def _mifid(self) -> Measured:
        distance, _ = self._frechet("main")
        memorization = memorization_distance(self.features["main"], self._reference_features)
        value = memorization_informed(distance.value, memorization)
        return value, {**self._counts(), "fd": distance.value, "memorization": memorization}

    def _clip_distance(self, *, unbiased: bool) -> Measured:
        found = frechet_video(
            self.features["main"],
            self._reference_features,
            unbiased=unbiased,
            seed=self.settings.seed,
        )
        details = self._counts() | found.details()
        floor = self.reference.frechet_floor(details["n"], self.settings.seed, unbiased=unbiased)
        if floor is not None:
            details |= {"floor": floor[0], "floor_n": floor[1]}
        return found.value, details

    def _fvd(self) -> Measured:
        return self._clip_distance(unbiased=False)

    def _fvd_unbiased(self) -> Measured:
        return self._clip_distance(unbiased=True)

    def _kvd(self) -> Measured:
        found = kernel_video(self.features["main"], self._reference_features)
        return found.value, self._counts() | found.details()

    def _counts(self) -> dict[str, Any]:
        return {"n": len(self.features["main"]), "reference_n": len(self._reference_features)}


def _warn_small(network: str, count: int, dim: int) -> None:
    if count > dim or (network, dim) in _WARNED or not _first_process():
        return
    _WARNED.add((network, dim))
    warnings.warn(
        f"The Frechet distance of '{network}' is computed from {count} samples in {dim} "
        f"dimensions: it is exact for these samples, but far above that of the whole law. "
        f"Use more than {dim} samples, or look at KID.",
        stacklevel=2,
    )


def _first_process() -> bool:
    dist = torch.distributed
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
