"""Reference statistics: files of the published suites, and a cache format of our own.

Read: npz of the ADM suite (``mu``, ``sigma``, ``mu_s``, ``sigma_s``, ``arr_0``) and of EDM (``mu``,
``sigma``), EDM2's pkl (numpy arrays only), npz of sample pictures (``arr_0``, ``arr_1``), and our
``.safetensors``, which says by which network and resizing the features were made.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.errors import DataError, ProtocolError
from genscale.io.files import atomic_write
from genscale.io.images import channels_first, load_npz
from genscale.metrics.features import FeatureNetwork, file_sha256
from genscale.metrics.moments import Moments
from genscale.metrics.pickles import read_array_pickle

FORMAT_VERSION = "1"


@dataclass(frozen=True, slots=True)
class GaussianStatistics:
    """Mean ``(d,)`` and unbiased covariance ``(d, d)``, float64; the count is 0 where unknown."""

    mean: Tensor
    covariance: Tensor
    count: int = 0

    @classmethod
    def of(cls, moments: Moments) -> GaussianStatistics:
        """Return the statistics of collected moments."""
        return cls(moments.mean.cpu(), moments.covariance().cpu(), moments.count)


@dataclass(frozen=True, slots=True)
class ReferenceOrigin:
    """What reference features were made of; all strings, stored in the file's metadata.

    Attributes:
        dataset: name of the data set.
        split: its split.
        resolution: side of the pictures.
        extractor: :attr:`FeatureNetwork.description`.
        extractor_sha256: digest of its weights; empty where a published file does not say.
        mode: how pictures were resized for it.
        fingerprint: digest of the data.
        class_law: distribution of the labels.
        crop: how pictures were brought to size.
        versions: library versions.
    """

    dataset: str = ""
    split: str = ""
    resolution: str = ""
    extractor: str = ""
    extractor_sha256: str = ""
    mode: str = ""
    fingerprint: str = ""
    class_law: str = ""
    crop: str = ""
    versions: str = ""


@dataclass(frozen=True, slots=True)
class ReferenceFile:
    """What a reference file holds.

    Attributes:
        name: the file's name without its ending.
        sha256: digest of the file.
        statistics: Gaussians by kind: ``mu`` for the main features, ``mu_s`` for the spatial ones.
        origin: what the statistics were made of; None for a file of pictures only.
        features: ``(n, d)`` float32 main features, if stored.
        images: uint8 ``(n, C, H, W)``, if stored.
        labels: ``(n,)`` int64 of the images, if stored.
    """

    name: str
    sha256: str
    statistics: dict[str, GaussianStatistics] = field(default_factory=dict)
    origin: ReferenceOrigin | None = None
    features: Tensor | None = None
    images: Tensor | None = None
    labels: Tensor | None = None


def read_reference(path: Path | str) -> ReferenceFile:
    """Read a reference file by its ending: ``.npz``, ``.pkl`` or ``.safetensors``.

    Raises:
        DataError: if the file is missing, damaged, of another layout, or would run code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"No reference at {path}. Give an existing npz, pkl or safetensors file.")
    readers = {".npz": _read_npz, ".pkl": _read_pickle, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise DataError(
            f"{path} has the unknown ending '{path.suffix}'. "
            f"A reference is one of {', '.join(readers)}."
        )
    found = readers[path.suffix](path)
    return replace(found, name=path.stem, sha256=file_sha256(str(path)))


def _read_npz(path: Path) -> ReferenceFile:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            arrays = {name: archive[name] for name in names if name.startswith(("mu", "sigma"))}
    except (
        ValueError,
        TypeError,
        OSError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if str(error).startswith("Object arrays"):
            raise DataError(
                f"{path} holds pickled Python objects, which could run code and are never read. "
                "Write plain arrays: mu, sigma."
            ) from error
        raise DataError(
            f"{path} is damaged or no npz file: {path.stat().st_size} bytes were found. "
            "Copy it again."
        ) from error
    if "arr_0" not in names and "mu" not in names:
        raise DataError(
            f"{path} holds {', '.join(names) or 'nothing'}, but a reference holds mu and sigma, or "
            "pictures in arr_0 (uint8 of shape (n, H, W, 3), clips (n, T, H, W, 3)). Give another "
            "file."
        )
    images, labels = None, None
    if "arr_0" in names:
        pixels, labels = load_npz(path)
        images = channels_first(pixels)
    statistics = _statistics(arrays, path)
    # the published suites all use the 2015 graph with its own resizing
    origin = ReferenceOrigin(extractor="inception_tf", mode="tf1_bilinear") if statistics else None
    return ReferenceFile("", "", statistics, origin, images=images, labels=labels)


def _read_pickle(path: Path) -> ReferenceFile:
    content = read_array_pickle(path)
    if not isinstance(content, dict) or not isinstance(content.get("fid"), dict):
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path} holds {keys}, but {{num_images, fid: {{mu, sigma}}}} was expected. "
            "Convert the statistics to npz."
        )
    count = content.get("num_images", 0)
    arrays = {name: content["fid"][name] for name in ("mu", "sigma") if name in content["fid"]}
    statistics = _statistics(arrays, path, int(count) if isinstance(count, int | np.integer) else 0)
    origin = ReferenceOrigin(extractor="inception_tf", mode="tf1_bilinear")
    return ReferenceFile("", "", statistics, origin)


def _read_safetensors(path: Path) -> ReferenceFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{path} is damaged or no safetensors file: {path.stat().st_size} bytes were found. "
            "Copy it again, or make it with scripts/make_reference.py."
        ) from error
    if metadata.get("format_version") != FORMAT_VERSION or "mu" not in tensors:
        raise DataError(
            f"{path} is no reference of format {FORMAT_VERSION} (it says "
            f"{metadata.get('format_version', 'nothing')}). Make one with "
            "scripts/make_reference.py."
        )
    arrays = {k: v.numpy() for k, v in tensors.items() if k.startswith(("mu", "sigma"))}
    count = int(tensors["num_images"]) if "num_images" in tensors else 0
    known = {name: metadata.get(name, "") for name in ReferenceOrigin.__dataclass_fields__}
    return ReferenceFile(
        "",
        "",
        _statistics(arrays, path, count),
        ReferenceOrigin(**known),
        features=tensors.get("features"),
    )


def _statistics(
    arrays: dict[str, Any], path: Path, count: int = 0
) -> dict[str, GaussianStatistics]:
    """Pair means with covariances (mu with sigma, mu_s with sigma_s) and check them."""
    result = {}
    for name in [name for name in arrays if name.startswith("mu")]:
        other = "sigma" + name[2:]
        if other not in arrays:
            raise DataError(f"{path} holds {name} but no {other}. Give a complete file.")
        mean, covariance = np.asarray(arrays[name]), np.asarray(arrays[other])
        square = mean.ndim == 1 and covariance.shape == (len(mean), len(mean))
        if not square or mean.dtype.kind != "f" or covariance.dtype.kind != "f":
            raise DataError(
                f"{name} and {other} of {path} are {mean.dtype}{mean.shape} and "
                f"{covariance.dtype}{covariance.shape}, but floats of shapes (d,) and (d, d) were "
                "expected. Give another file."
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise DataError(f"{name} or {other} of {path} holds NaN or infinity. Make it again.")
        result[name] = GaussianStatistics(
            torch.from_numpy(mean.astype(np.float64)),
            torch.from_numpy(covariance.astype(np.float64)),
            count,
        )
    return result


def reference_file_name(origin: ReferenceOrigin) -> str:
    """Return ``{dataset}-{split}-{resolution}-{extractor}-{mode}-{hash8}.safetensors``."""
    words = (origin.dataset, origin.split, origin.resolution, origin.extractor, origin.mode)
    digest = origin.extractor_sha256[:8] or "unknown"
    return "-".join(word or "unknown" for word in (*words, digest)) + ".safetensors"


def write_reference(
    path: Path | str,
    statistics: dict[str, GaussianStatistics],
    origin: ReferenceOrigin,
    *,
    features: Tensor | None = None,
) -> Path:
    """Write a reference under a temporary name, then rename it; call on one process only.

    Args:
        path: the file, or an existing folder, in which it gets :func:`reference_file_name`.
        statistics: by kind, at least ``mu``.
        origin: what the features were made of.
        features: ``(n, d)`` main features for KID and neighbours, stored as float32.

    Returns:
        the file written.
    """
    from safetensors.torch import save_file

    path = Path(path).expanduser()
    if path.is_dir():
        path = path / reference_file_name(origin)
    tensors = {"num_images": torch.tensor(statistics["mu"].count, dtype=torch.int64)}
    for name, gaussian in statistics.items():
        tensors[name] = gaussian.mean.contiguous()
        tensors["sigma" + name[2:]] = gaussian.covariance.contiguous()
    if features is not None:
        tensors["features"] = features.to(torch.float32).contiguous()
    metadata = {"format_version": FORMAT_VERSION, "dtype": "float64", **asdict(origin)}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)
    return path


def require_compatible(
    reference: ReferenceFile, network: FeatureNetwork, *, ignore: Iterable[str] = ()
) -> None:
    """Refuse statistics made with other features than ``network`` gives.

    Args:
        reference: a file with statistics.
        network: the prepared network that will look at the samples.
        ignore: fields of the origin that may differ all the same.

    Raises:
        ProtocolError: names the fields that differ, with both values.
    """
    if reference.origin is None:
        return
    own = {
        "extractor": network.description,
        "mode": network.resize,
        "extractor_sha256": network.sha256,
    }
    differing = [
        f"{name} ({getattr(reference.origin, name)} and {value})"
        for name, value in own.items()
        if getattr(reference.origin, name) not in ("", value) and name not in set(ignore)
    ]
    if differing:
        raise ProtocolError(
            f"The reference {reference.name} and the feature network '{network.name}' differ in "
            f"{', '.join(differing)}. Use the same network and resizing for both."
        )
