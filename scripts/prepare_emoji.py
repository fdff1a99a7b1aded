"""Write data/emoji/emoji.npz from the npm package emoji-datasource-google.

    python scripts/prepare_emoji.py [SOURCE] [--out data/emoji]

SOURCE is the package as a .tgz (made by: npm pack emoji-datasource-google) or unpacked. Without
SOURCE this calls npm pack itself (74 MB); npm is needed for nothing else. The pictures are Noto
Emoji (Apache-2.0); the licence notice is written into the file and beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.cli.failures import report
from genscale.data.emoji import DEFAULT_FILE, STORED, EmojiRecord, write_emoji
from genscale.data.transforms import to_rgb, to_tensor
from genscale.errors import DataError

PACKAGE = "emoji-datasource-google"
VERSION = "16.0.0"  # what npm pack is asked for: another one has other pictures
PICTURES = f"img/google/{STORED}"
TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


def read_package(source: Path) -> dict[str, bytes]:
    """Return the two indices and the pictures of the package by their paths in it.

    Raises:
        DataError: if the source is neither a folder nor a .tgz.
    """
    if source.is_dir():
        inner = source / "package"
        root = inner if inner.is_dir() else source
        paths = [root / "package.json", root / "emoji.json", *(root / PICTURES).glob("*.png")]
        found = {path.relative_to(root).as_posix(): path for path in paths if path.is_file()}
        return {name: path.read_bytes() for name, path in found.items()}
    files = {}
    try:
        with tarfile.open(source) as archive:
            for member in archive:  # in one pass: looking a file up would unpack up to it again
                name = member.name.removeprefix("package/")
                if name in ("package.json", "emoji.json") or name.startswith(f"{PICTURES}/"):
                    file = archive.extractfile(member)
                    if file is not None:
                        files[name] = file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        reason = str(error).split("\n")[0].rstrip(" :")  # tarfile adds a line a compression
        raise DataError(
            f"{source} cannot be read as a .tgz or a folder ({reason}). Get the package with: "
            f"npm pack {PACKAGE}@{VERSION}"
        ) from error
    return files


def list_pictures(index: list[dict[str, Any]]) -> list[tuple[str, EmojiRecord]]:
    """Return file name and record of every picture: each emoji, then its skin tones."""
    found = []
    for entry in index:
        base = EmojiRecord(
            entry["name"].lower(), entry["category"], entry["subcategory"], entry["image"]
        )
        variants = entry.get("skin_variations", {}).items()
        pictures = [("", entry), *((tone_words(key), variant) for key, variant in variants)]
        for tone, picture in pictures:
            if picture["has_img_google"]:
                record = EmojiRecord(base.name, base.category, base.subcategory, base.base, tone)
                found.append((picture["image"], record))
    return found


def tone_words(key: str) -> str:
    """Return a skin tone, or two of them, in words."""
    return " and ".join(TONES[part] for part in key.split("-"))


def read_picture(data: bytes, name: str) -> Tensor:
    """Return a picture laid on white: uint8 ``(3, 64, 64)``."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            pixels = to_tensor(to_rgb(image), 3)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{name} cannot be read as a picture ({error}). Get the package anew with: "
            f"npm pack {PACKAGE}@{VERSION}"
        ) from error
    if pixels.shape != (3, STORED, STORED):
        raise DataError(
            f"{name} has {pixels.shape[2]}x{pixels.shape[1]} pixels, and {STORED}x{STORED} were "
            f"expected. Take version {VERSION} of {PACKAGE}."
        )
    return pixels


def prepare(source: Path, out: Path) -> tuple[Path, int, int]:
    """Write the prepared file; return its path, the number of emoji and of skin tone variants.

    Raises:
        DataError: if the source is not the package, or a picture cannot be read.
    """
    files = read_package(source)

    def file(path: str) -> bytes:
        if path not in files:
            raise DataError(
                f"{source} holds no {path}, so it is not the package {PACKAGE}. Get it with: "
                f"npm pack {PACKAGE}@{VERSION}"
            )
        return files[path]

    version = json.loads(file("package.json"))["version"]
    listed = list_pictures(json.loads(file("emoji.json")))
    pixels = [read_picture(file(f"{PICTURES}/{name}"), name) for name, _ in listed]
    records = [record for _, record in listed]
    path = out / DEFAULT_FILE.name
    write_emoji(path, torch.stack(pixels), records, f"{PACKAGE} {version}")
    variants = sum(bool(record.skin_tone) for record in records)
    return path, len(records) - variants, variants


def fetch(folder: Path) -> Path:
    """Download the package with npm.

    Raises:
        DataError: if there is no npm, or it fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"There is no npm on this machine to fetch {PACKAGE} {VERSION} with, and no SOURCE was "
            f"given. Run 'npm pack {PACKAGE}@{VERSION}' elsewhere and give the .tgz as SOURCE."
        )
    command = [npm, "pack", f"{PACKAGE}@{VERSION}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    packed = list(folder.glob("*.tgz"))
    if result.returncode or not packed:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(
            f"npm could not fetch {PACKAGE} {VERSION} ({last}). Check the network, or give the "
            ".tgz as SOURCE."
        )
    return packed[0]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", nargs="?", type=Path, help="the package, .tgz or unpacked")
    parser.add_argument("--out", type=Path, default=DEFAULT_FILE.parent, help="folder to write to")
    arguments = parser.parse_args(words)
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = arguments.source or fetch(Path(folder))
            path, emoji, variants = prepare(source, arguments.out)
    except Exception as error:
        return report(error)
    print(f"{path}: {emoji} emoji and {variants} variants with skin tones")
    return 0


if __name__ == "__main__":
    sys.exit(main())
