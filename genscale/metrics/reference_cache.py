"""Features of reference pictures, kept on disk: a slow network looks at a reference once."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from torch import Tensor

from genscale.io.files import atomic_write, cache_home
from genscale.metrics.features import FeatureNetwork, Watch, extract

_LAYOUT = "1"  # changes when files of an older layout must not be read any more


def cache_folder() -> Path:
    """Return the folder: ``$GENSCALE_CACHE``, else ``~/.cache/genscale``, below it references."""
    return cache_home() / "references"


def extract_once(
    network: FeatureNetwork,
    images: Tensor,
    taps: tuple[str, ...],
    *,
    batch_size: int,
    folder: Path,
    watch: Watch | None = None,
) -> dict[str, Tensor]:
    """Return what :func:`~genscale.metrics.features.extract` does, from a file where there is one.

    A file is found by the digest of everything that the numbers follow from: the pictures, the
    weights, how pictures are resized, and the kind of device. A damaged file is told of and made
    again.

    Args:
        network: a prepared network.
        images: uint8 ``(n, 1 or 3, H, W)``.
        taps: names of the features.
        batch_size: pictures a pass, where features have to be computed.
        folder: where files lie; made if missing.
        watch: shows the progress of computing.

    Returns:
        ``(n, length)`` float tensors by tap, on the CPU.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = folder / f"{network.name}-{_digest(network, images, taps)[:32]}.safetensors"
    if path.is_file():
        try:
            found: dict[str, Tensor] = load_file(path)
            if set(found) == set(taps) and all(len(each) == len(images) for each in found.values()):
                return found
        except (SafetensorError, OSError, ValueError):
            pass
        warnings.warn(
            f"{path} is damaged: features of {len(images)} reference pictures were expected. "
            "They are computed again.",
            stacklevel=2,
        )
    features = extract(network, images, taps, batch_size=batch_size, watch=watch)
    with atomic_write(path) as temporary:
        save_file({tap: value.contiguous() for tap, value in features.items()}, temporary)
    return features


def _digest(network: FeatureNetwork, images: Tensor, taps: tuple[str, ...]) -> str:
    device = next((parameter.device.type for parameter in network.parameters()), "cpu")
    words = (_LAYOUT, network.description, network.sha256, network.resize, *taps, device)
    digest = hashlib.sha256(repr((words, tuple(images.shape))).encode())
    for part in images.split(1024):
        digest.update(part.cpu().contiguous().numpy().data)
    return digest.hexdigest()
