"""Noto emoji: some 1,900 small colour pictures with names, in ten categories."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from genscale.data.base import TensorImages, check_resolution
from genscale.data.transforms import resize
from genscale.errors import ConfigError, DataError
from genscale.io.files import atomic_write

if TYPE_CHECKING:
    from genscale.data.module import ImageDataModule

DEFAULT_FILE = Path("data/emoji/emoji.npz")
"""What scripts/prepare_emoji.py writes."""

STORED = 64  # pixels a side in the prepared file
HELDOUT_SHARE = 0.1
NOTICE = """\
The pictures are Noto Emoji, Copyright Google LLC, licensed under the Apache License, Version 2.0
(https://www.apache.org/licenses/LICENSE-2.0). They were laid on white and are otherwise unchanged.
Names and categories come from the npm package emoji-datasource-google, Copyright (c) 2013 Cal
Henderson, MIT licence.
"""
_HOW = "Prepare it with: python scripts/prepare_emoji.py"


@dataclass(frozen=True, slots=True)
class EmojiRecord:
    """What is known of one picture.

    Attributes:
        name: its name in lower case.
        category: for example ``Food & Drink``.
        subcategory: for example ``food-fruit``.
        base: name of the file of the emoji without skin tones, the same for all its variants.
        skin_tone: the tone in words, for example ``medium-dark``; empty for the emoji itself.
    """

    name: str
    category: str
    subcategory: str
    base: str
    skin_tone: str = ""


def write_emoji(
    path: str | Path, pixels: Tensor, records: Sequence[EmojiRecord], source: str
) -> None:
    """Write the prepared file, and beside it ``NOTICE.txt``.

    Args:
        path: the file, ending in ``.npz``.
        pixels: uint8 ``(n, 3, 64, 64)``, laid on white.
        records: one a picture.
        source: where they come from, with the version.
    """
    index = {
        "source": source,
        "notice": NOTICE,
        "records": [dataclasses.asdict(record) for record in records],
    }
    encoded = np.frombuffer(json.dumps(index).encode(), np.uint8)
    with atomic_write(path) as temporary:
        np.savez_compressed(temporary, pixels=pixels.numpy(), index=encoded)
    with atomic_write(Path(path).with_name("NOTICE.txt")) as temporary:
        temporary.write_text(NOTICE, encoding="ascii")


def read_emoji(path: str | Path) -> tuple[Tensor, list[EmojiRecord]]:
    """Read the prepared file: pixels uint8 ``(n, 3, 64, 64)`` and one record a picture.

    Raises:
        DataError: if it is missing, damaged, or of another layout.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(
            f"There is no file of emoji at {path} (74 MB to fetch, about 10 MB prepared). {_HOW}"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels = torch.from_numpy(arrays["pixels"])
            index = json.loads(arrays["index"].tobytes())
        records = [EmojiRecord(**record) for record in index["records"]]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read as a file of emoji ({type(error).__name__}: {error}). {_HOW}"
        ) from error
    expected = (len(records), 3, STORED, STORED)
    if pixels.dtype != torch.uint8 or pixels.shape != expected:
        raise DataError(
            f"{path} holds pixels {pixels.dtype} of shape {tuple(pixels.shape)}, but uint8 of "
            f"shape {expected} was expected. {_HOW}"
        )
    return pixels, records


class Emoji(TensorImages):
    """Noto emoji on white, with their names as captions and their categories as classes.

    The pictures are stored at 64 pixels; other resolutions are resized with a bicubic filter. A
    tenth of the emoji is held out, chosen by a hash of each file's name: an emoji stays on its
    side in later versions, and all its skin tones are on the same side.

    Args:
        root: the prepared file or its folder; None for :data:`DEFAULT_FILE`.
        split: ``"train"`` or ``"heldout"``.
        resolution: 16 to 512 pixels.
        skin_tones: include the variants with skin tones, nearly all of people and hands.
        subcategories: add the words of the subcategory to the captions: ``"rose, plant flower"``
            for ``"rose"``.

    Raises:
        DataError: if the file is missing or damaged.
        ConfigError: if an argument is not one of those above.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: Literal["train", "heldout"] = "train",
        resolution: int = 32,
        *,
        skin_tones: bool = False,
        subcategories: bool = False,
    ) -> None:
        if split not in ("train", "heldout"):
            raise ConfigError(f"split='{split}' is unknown. Emoji has 'train' and 'heldout'.")
        check_resolution(resolution, 16, 512, "the emoji")
        path = DEFAULT_FILE if root is None else Path(root).expanduser()
        path = path / DEFAULT_FILE.name if path.is_dir() else path
        pixels, records = read_emoji(path)
        names = tuple(sorted({record.category for record in records}))
        chosen = [
            i
            for i, record in enumerate(records)
            if (skin_tones or not record.skin_tone)
            and _is_held_out(record.base) == (split == "heldout")
        ]
        if not chosen:
            raise DataError(
                f"{path} has {len(records)} pictures, and none of them is in the split '{split}'. "
                f"It is not the whole set. {_HOW}"
            )
        kept = [records[i] for i in chosen]
        super().__init__(
            resize(pixels[torch.tensor(chosen)], resolution),
            torch.tensor([names.index(record.category) for record in kept]),
            class_names=names,
            name="emoji",
            captions=[_caption(record, subcategories) for record in kept],
        )


def _is_held_out(base: str) -> bool:
    """Return the side of an emoji; fixed by its file name for ever."""
    return hashlib.sha256(base.encode()).digest()[0] / 256 < HELDOUT_SHARE


def _caption(record: EmojiRecord, subcategory: bool) -> str:
    words = [record.name]
    if record.skin_tone:
        words.append(f"{record.skin_tone} skin tone")
    if subcategory:
        words.append(record.subcategory.replace("-", " "))
    return ", ".join(words)


def emoji_module(
    *,
    name: str,
    root: str | None,
    resolution: int,
    channels: int,
    num_classes: int,
    skin_tones: bool,
    subcategories: bool,
    flip: bool,
    num_workers: int,
    batch_size: int,
    seed: int,
    limit: int | None = None,
) -> ImageDataModule:
    """Build the data module of ``data=emoji``; the arguments are the keys of its YAML.

    Raises:
        ConfigError: if ``num_classes`` is not the file's, or an argument is out of range.
        DataError: if the file is missing or damaged.
    """
    from genscale.data.module import ImageDataModule, check_num_classes

    if channels != 3:
        raise ConfigError(f"data.channels={channels}, but emoji are RGB. Set data.channels=3.")

    def emoji(split: Literal["train", "heldout"]) -> Emoji:
        return Emoji(root, split, resolution, skin_tones=skin_tones, subcategories=subcategories)

    train = emoji("train")
    check_num_classes(train, num_classes)
    return ImageDataModule(
        train,
        emoji("heldout"),
        name=name,
        batch_size=batch_size,
        num_workers=num_workers,
        flip=flip,
        seed=seed,
        limit=limit,
    )
