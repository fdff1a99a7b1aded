"""Where weights of feature networks lie, and what the published files are called.

Nothing is ever downloaded: a file is put into the weights folder once, with
``python -m genscale.cli.fetch metrics --from FILE``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from genscale.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """A weight file known by name.

    Attributes:
        network: the feature network that reads it.
        file_names: accepted names in the weights folder, the published one first.
        sha256_prefix: first digits of the published file's SHA-256; None if unknown.
        origin: where people find it, in words.
    """

    network: str
    file_names: tuple[str, ...]
    sha256_prefix: str | None
    origin: str


INCEPTION_WEIGHTS = PublishedWeights(
    network="inception",
    file_names=(
        "pt_inception-2015-12-05-6726825d.pth",
        "weights-inception-2015-12-05-6726825d.pth",
        "inception-2015-12-05.safetensors",
        "inception-2015-12-05.pth",
    ),
    sha256_prefix="6726825d",
    origin="the release files 'fid_weights' of mseitzer/pytorch-fid, or the release files of "
    "toshas/torch-fidelity",
)


def weights_folder() -> Path:
    """Return the weights folder: ``$GENSCALE_WEIGHTS``, else ``~/.cache/genscale/weights``."""
    named = os.environ.get("GENSCALE_WEIGHTS")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "genscale" / "weights"


def find_weights(published: PublishedWeights, path: Path | str | None = None) -> Path:
    """Return the file to read: ``path`` if given, else the first known name in the folder.

    Raises:
        CheckpointError: if there is none.
    """
    if path is not None:
        given = Path(path).expanduser()
        if not given.is_file():
            raise CheckpointError(
                f"No weights for '{published.network}' at {given}. Give the path of a state dict, "
                f"such as {published.file_names[0]}."
            )
        return given
    folder = weights_folder()
    for name in published.file_names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"No weights for '{published.network}' in {folder} (expected {published.file_names[0]}, "
        f"from {published.origin}). Install a copy with: "
        "python -m genscale.cli.fetch metrics --from FILE"
    )
