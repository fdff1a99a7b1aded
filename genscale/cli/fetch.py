"""``python -m genscale.cli.fetch metrics --from FILE``: put weights of feature networks in place.

Nothing is downloaded, here or during a run: a file that lies on this machine is checked (keys,
shapes, SHA-256 where it is known; nothing in it is executed) and copied into the weights folder,
``$GENSCALE_WEIGHTS`` or ``~/.cache/genscale/weights``. Without ``--from`` it is listed what is
there, what is missing, and what the published files are called.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from genscale.cli.failures import report
from genscale.errors import CheckpointError
from genscale.io.files import atomic_write
from genscale.io.weights import read_checkpoint
from genscale.metrics.efficientnet import EfficientNetLite0
from genscale.metrics.features import file_sha256
from genscale.metrics.inception import InceptionFID
from genscale.metrics.weights import INCEPTION_WEIGHTS, weights_folder


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m genscale.cli.fetch",
        description="Put weights of feature networks into the weights folder, or list them.",
    )
    parser.add_argument("what", choices=["metrics"], help="weights for evaluation")
    parser.add_argument("--from", dest="source", metavar="FILE", help="a weight file you have")
    parser.add_argument(
        "--unverified", action="store_true", help="take a file whose SHA-256 is not the known one"
    )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.source is None:
            print(listing())
        else:
            print(f"installed {install(Path(chosen.source), unverified=chosen.unverified)}")
    except BaseException as error:
        return report(error)
    return 0


def listing() -> str:
    """Say which weights are there, which are missing, and where published files are named."""
    folder = weights_folder()
    published = INCEPTION_WEIGHTS
    found = [name for name in published.file_names if (folder / name).is_file()]
    lines = [f"weights folder: {folder}"]
    if found:
        lines.append(f"inception  there    {folder / found[0]}")
    else:
        lines += [
            f"inception  missing  {published.file_names[0]} (FID, sFID, inception score)",
            f"                    from {published.origin};",
            "                    then: python -m genscale.cli.fetch metrics --from FILE",
        ]
    missing = EfficientNetLite0().check()
    lines += [f"lite0      missing  {sentence}" for sentence in missing]
    if not missing:
        lines.append("lite0      there    in an installed package (FD-lite0)")
    return "\n".join(lines)


def install(source: Path, *, unverified: bool = False) -> Path:
    """Check a weight file of the FID Inception network and copy it into the weights folder.

    Args:
        source: a state dict (``.pth``, ``.pt`` or ``.safetensors``).
        unverified: take it although its SHA-256 is not the published one.

    Returns:
        the file written, under a temporary name first.

    Raises:
        CheckpointError: if the file is missing, damaged, would run code, is of another network, or
            has another SHA-256.
    """
    source = source.expanduser()
    published = INCEPTION_WEIGHTS
    InceptionFID().load_weights(read_checkpoint(source), source=source)
    digest = file_sha256(str(source))
    verified = published.sha256_prefix is not None and digest.startswith(published.sha256_prefix)
    if not verified and not unverified:
        raise CheckpointError(
            f"{source} has the keys and shapes of the FID network, but its SHA-256 begins with "
            f"{digest[:8]} and that of {published.file_names[0]} with {published.sha256_prefix}. "
            "Get the published file, or take this one with --unverified."
        )
    suffix = ".safetensors" if source.suffix == ".safetensors" else ".pth"
    name = published.file_names[0] if verified else f"inception-2015-12-05{suffix}"
    target = weights_folder() / name
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)
    return target


if __name__ == "__main__":
    sys.exit(main())
