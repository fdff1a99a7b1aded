"""What a cache keeps of clips: several of each video, and captions beside the shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genscale.data.base import row_numbers
from genscale.data.clips import ClipDataset
from genscale.errors import DataError
from genscale.io.files import write_json
from genscale.rng import Purpose, key

CAPTIONS = "captions.json"


class KeptClips:
    """Rows of a cache of clips: of each video its fixed clip, then clips that keys choose.

    Row i of the cache is clip ``i mod each`` of video ``i // each``.

    Args:
        clips: the videos.
        each: clips of one video.
        seed: of the keys.
    """

    def __init__(self, clips: ClipDataset, each: int, seed: int) -> None:
        self._clips = clips
        self._each = each
        self._seed = seed

    def __len__(self) -> int:
        return len(self._clips) * self._each

    @property
    def labels(self) -> Tensor | None:
        """Class ids ``(n,)`` int64, or None."""
        labels = self._clips.labels
        return None if labels is None else labels.repeat_interleave(self._each)

    def captions(self, *, mirrored: bool) -> KeptCaptions | None:
        """Return the captions of all rows, or None where the videos have none.

        Args:
            mirrored: mirrored clips are kept, too.
        """
        texts = self._clips.captions
        if texts is None:
            return None
        every = tuple(text for text in texts for _ in range(self._each))
        turned = tuple(map(self._clips.mirrored_caption, every))
        return KeptCaptions(every, turned if mirrored and turned != every else None)

    def read(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return clips, uint8 ``(n, C, T, H, W)``, and their frames a second, float32 ``(n,)``.

        Raises:
            DataError: a video cannot be read: one that another replaces must not be kept.
        """
        rows = row_numbers(indices, len(self))
        videos, fixed = rows // self._each, rows % self._each == 0
        side = self._clips.resolution
        shape = (self._clips.channels, self._clips.num_frames, side, side)
        clips = torch.empty(len(rows), *shape, dtype=torch.uint8)
        rates = torch.empty(len(rows))
        if bool(fixed.any()):
            clips[fixed] = self._clips.images(videos[fixed])
            rates[fixed] = self._clips.frame_rate(videos[fixed])
        if not bool(fixed.all()):
            keys = key(self._seed, rows[~fixed], Purpose.CLIP)
            clips[~fixed], rates[~fixed] = self._clips.clips(videos[~fixed], keys)
        damaged: Sequence[str] = getattr(self._clips, "damaged", ())
        if damaged:
            raise DataError(
                f"{damaged[0]} cannot be read, and another video must not be kept in its place. "
                "Set data.verify=frames with data.damaged=skip, which leaves such videos out."
            )
        return clips, rates


@dataclass(frozen=True, slots=True)
class KeptCaptions:
    """The captions of a cache.

    Args:
        captions: one a row.
        mirrored: of the mirrored clips, or None where they are the same.
    """

    captions: tuple[str, ...]
    mirrored: tuple[str, ...] | None

    @property
    def digest(self) -> str:
        """SHA-256 over all of them."""
        return hashlib.sha256(json.dumps([self.captions, self.mirrored]).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write ``captions.json``, atomically."""
        write_json(folder / CAPTIONS, {"captions": self.captions, "mirrored": self.mirrored})

    def of(self, row: int, *, mirrored: bool) -> str:
        """Return the caption of a row."""
        texts = self.mirrored if mirrored and self.mirrored is not None else self.captions
        return texts[row]


def read_captions_kept(folder: Path, digest: str) -> KeptCaptions:
    """Read ``captions.json`` and hold it against the digest that the index states.

    Raises:
        DataError: it is missing, or not what was written.
    """
    file = folder / CAPTIONS
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        turned = content["mirrored"]
        kept = KeptCaptions(tuple(content["captions"]), None if turned is None else tuple(turned))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} cannot be read ({type(error).__name__}). Run the command that made the cache "
            "again; it makes what is missing."
        ) from error
    if kept.digest != digest:
        raise DataError(
            f"{file} does not hold the captions that were written. Delete it, and run the command "
            "that made the cache again."
        )
    return kept
