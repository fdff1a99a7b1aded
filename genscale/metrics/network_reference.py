"""What samples are compared with, seen through one feature network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from genscale.errors import DataError
from genscale.metrics.features import FeatureNetwork, Watch, extract
from genscale.metrics.frechet import compare_features
from genscale.metrics.moments import Moments
from genscale.metrics.novelty import nearest_distances
from genscale.metrics.reference import GaussianStatistics, ReferenceFile, require_compatible
from genscale.metrics.reference_cache import extract_once
from genscale.metrics.subsets import keyed_rows

SPATIAL = "spatial"  # the tap of sFID
_TAP_OF_STATISTICS = {"mu_s": SPATIAL}  # mu belongs to the network's main tap


class NetworkReference:
    """What samples are compared with, through one feature network.

    Args:
        statistics: Gaussians by tap.
        features: ``(n, d)`` main features of the reference pictures, or None.
        heldout: ``(m, d)`` main features of real pictures outside the reference, or None.
    """

    def __init__(
        self,
        statistics: dict[str, GaussianStatistics],
        *,
        features: Tensor | None = None,
        heldout: Tensor | None = None,
    ) -> None:
        self.statistics = statistics
        self.features = features
        self.heldout = heldout
        self._floors: dict[tuple[int, int, bool], float] = {}
        self._heldout_distances: dict[tuple[int, int], Tensor] = {}

    def frechet_floor(
        self, count: int, seed: int, *, unbiased: bool = True
    ) -> tuple[float, int] | None:
        """Return what real pictures score: the distance of held-out ones, and how many were taken.

        As many as there are samples are taken where there are enough, since the distance of a set
        depends on its size; None without held-out pictures.
        """
        if self.features is None or self.heldout is None or len(self.heldout) < 2:
            return None
        rows = keyed_rows(len(self.heldout), max(count, 2), seed)
        kept = len(rows), seed, unbiased
        if kept not in self._floors:
            compared = compare_features(self.heldout[rows], self.features, unbiased=unbiased)
            self._floors[kept] = compared.value
        return self._floors[kept], len(rows)

    def heldout_distances(self, limit: int, seed: int) -> Tensor:
        """Return distances of at most ``limit`` held-out pictures to their nearest reference."""
        if self.heldout is None or self.features is None:
            raise DataError(
                "Novelty compares samples with held-out pictures, but the reference has none. "
                "Give held-out pictures beside the training set."
            )
        if (limit, seed) not in self._heldout_distances:
            rows = keyed_rows(len(self.heldout), limit, seed)
            distances = nearest_distances(self.heldout[rows], self.features)
            self._heldout_distances[limit, seed] = distances
        return self._heldout_distances[limit, seed]


def reference_from_images(
    network: FeatureNetwork,
    images: Tensor,
    heldout: Tensor | None = None,
    *,
    spatial: bool = False,
    batch_size: int = 256,
    cache: Path | None = None,
    watch: Watch | None = None,
) -> NetworkReference:
    """Describe real pictures.

    Args:
        network: a prepared network.
        images: uint8 ``(n, C, H, W)`` reference pictures, or clips ``(n, C, T, H, W)``.
        heldout: further real pictures, or clips, or None.
        spatial: describe the spatial features of sFID too.
        batch_size: pictures a pass.
        cache: folder of :func:`~genscale.metrics.reference_cache.extract_once`; None computes
            features anew.
        watch: shows the progress of computing.
    """

    def look_at(pictures: Tensor, taps: tuple[str, ...]) -> dict[str, Tensor]:
        if cache is None:
            found = extract(network, pictures, taps, batch_size=batch_size, watch=watch)
        else:
            found = extract_once(
                network, pictures, taps, batch_size=batch_size, folder=cache, watch=watch
            )
        return {tap: value.flatten(0, -2) for tap, value in found.items()}  # frames become rows

    taps = (network.tap, SPATIAL) if spatial else (network.tap,)
    features = look_at(images, taps)
    outside = None if heldout is None else look_at(heldout, (network.tap,))[network.tap]
    return NetworkReference(
        {tap: GaussianStatistics.of(Moments.of(features[tap])) for tap in taps},
        features=features[network.tap],
        heldout=outside,
    )


def reference_from_file(
    network: FeatureNetwork,
    found: ReferenceFile,
    *,
    spatial: bool = False,
    features: bool = True,
    ignore: Iterable[str] = (),
    batch_size: int = 256,
) -> NetworkReference:
    """Describe a reference file: by its statistics if they are this network's, else its pictures.

    Args:
        network: a prepared network.
        found: the file.
        spatial: describe the spatial features of sFID too.
        features: features are needed, not only statistics; pictures are read for them.
        ignore: fields in which statistics may differ from the network.
        batch_size: pictures a pass.

    Raises:
        ProtocolError: if there are statistics of other features only.
        DataError: if there is nothing in the file to describe.
    """
    own = found.origin is not None and found.origin.extractor == network.description
    if found.statistics and (own or found.images is None):
        require_compatible(found, network, ignore=ignore)
        statistics = {
            _TAP_OF_STATISTICS.get(name, network.tap): value
            for name, value in found.statistics.items()
        }
        stored = found.features
        if stored is None and found.images is not None and features:
            taps = (network.tap,)
            stored = extract(network, found.images, taps, batch_size=batch_size)[network.tap]
            stored = stored.flatten(0, -2)
        return NetworkReference(statistics, features=stored)
    if found.images is None:
        raise DataError(
            f"The reference {found.name} holds neither statistics nor pictures for the network "
            f"'{network.name}'. Give another file."
        )
    return reference_from_images(network, found.images, spatial=spatial, batch_size=batch_size)


def facts_of(found: ReferenceFile) -> dict[str, Any]:
    """Return the fields of a protocol that tell a reference file."""
    counted = found.statistics.get("mu")
    pictures = 0 if found.images is None else len(found.images)
    return {
        "reference": found.name,
        "reference_sha256": found.sha256,
        "reference_split": found.origin.split if found.origin else "",
        "reference_crop": found.origin.crop if found.origin else "",
        "reference_count": pictures if counted is None else counted.count,
    }


def reference_problems(path: str | None, most: int) -> list[str]:
    """Return a sentence for a reference file that is not there, and for too few pictures."""
    problems = []
    if most < 2:
        problems.append(
            f"metrics.max_reference must be at least 2, but is {most}. "
            "Give e.g. metrics.max_reference=10000."
        )
    if path is not None and not Path(path).expanduser().is_file():
        problems.append(f"No reference at {path}. Give an existing npz, pkl or safetensors file.")
    return problems
