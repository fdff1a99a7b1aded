"""Write reference statistics of real pictures for one feature network.

python scripts/make_reference.py SOURCE --network inception --dataset imagenet --split train \
    [--resolution 256] [--mode tf1] [--weights FILE] [--features] [--out .]

SOURCE is a folder of pictures (cropped as ADM does to --resolution) or an npz with arr_0. The file
is named after what it holds; evaluate with evaluate.py reference=FILE.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.cli.failures import report
from genscale.data.image_folder import ImageFolder
from genscale.io.images import load_npz
from genscale.metrics.efficientnet import EfficientNetLite0
from genscale.metrics.features import FeatureNetwork, extract
from genscale.metrics.inception import InceptionFID
from genscale.metrics.moments import Moments
from genscale.metrics.network_reference import SPATIAL
from genscale.metrics.pixels import Pixels
from genscale.metrics.reference import GaussianStatistics, ReferenceOrigin, write_reference


def build_network(name: str, *, mode: str, weights: str | None) -> FeatureNetwork:
    if name == "inception":
        return InceptionFID(weights, mode=mode)  # type: ignore[arg-type]
    if name == "lite0":
        return EfficientNetLite0(weights=weights)
    return Pixels()


def read_batches(source: Path, resolution: int, size: int) -> tuple[Iterator[Tensor], str, int]:
    """Return batches of uint8 ``(B, C, H, W)``, a digest of the pictures, and their side."""
    if source.is_dir():
        folder = ImageFolder(source, resolution, labels="none")
        starts = range(0, len(folder), size)
        batches = (folder.images(range(i, min(i + size, len(folder)))) for i in starts)
        return batches, folder.fingerprint(), resolution
    pixels, _ = load_npz(source)
    digest = hashlib.sha256(pixels.numpy().data).hexdigest()
    images = pixels.permute(0, 3, 1, 2)
    batches = (images[i : i + size].contiguous() for i in range(0, len(images), size))
    return batches, digest, images.shape[2]


def collect(
    network: FeatureNetwork, batches: Iterator[Tensor], *, keep: bool, size: int
) -> tuple[dict[str, GaussianStatistics], Tensor | None]:
    """Stream moments of the main features, and of the spatial ones where there are any."""
    kinds = {"mu": network.tap} | ({"mu_s": SPATIAL} if SPATIAL in network.taps else {})
    moments: dict[str, Moments] = {}
    kept = []
    for batch in batches:
        features = extract(network, batch, tuple(kinds.values()), batch_size=size)
        for kind, tap in kinds.items():
            if kind not in moments:
                moments[kind] = Moments.empty(features[tap].shape[1])
            moments[kind].update(features[tap])
        if keep:
            kept.append(features[network.tap])
    statistics = {kind: GaussianStatistics.of(value) for kind, value in moments.items()}
    return statistics, torch.cat(kept) if keep else None


def make(arguments: argparse.Namespace) -> Path:
    network = build_network(arguments.network, mode=arguments.mode, weights=arguments.weights)
    network.prepare()
    network.to(arguments.device)
    # moments cost least in batches of at least 512 rows
    batches, digest, side = read_batches(arguments.source, arguments.resolution, 512)
    statistics, features = collect(
        network, batches, keep=arguments.features, size=arguments.batch_size
    )
    origin = ReferenceOrigin(
        dataset=arguments.dataset,
        split=arguments.split,
        resolution=str(side),
        extractor=network.description,
        extractor_sha256=network.sha256,
        mode=network.resize,
        fingerprint=digest,
        class_law="empirical",
        crop="adm_center_crop" if arguments.source.is_dir() else "",
        versions=f"torch {torch.__version__}",
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    return write_reference(arguments.out, statistics, origin, features=features)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="a folder of pictures, or an npz with arr_0")
    parser.add_argument("--network", choices=["inception", "lite0", "pixels"], default="inception")
    parser.add_argument("--mode", choices=["tf1", "pytorch_fid", "clean"], default="tf1")
    parser.add_argument("--weights", help="weight file; the weights folder by default")
    parser.add_argument("--dataset", required=True, help="name of the data set")
    parser.add_argument("--split", default="train")
    parser.add_argument("--resolution", type=int, default=256, help="side of a folder's pictures")
    parser.add_argument("--features", action="store_true", help="store features for KID, PRDC")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    try:
        print(make(parser.parse_args(words)))
    except Exception as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
