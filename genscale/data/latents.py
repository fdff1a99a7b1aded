"""Training from a cache of latents: moments of every picture, read through memory maps."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from genscale.assembly import build
from genscale.autoencoders.base import Autoencoder, Variational
from genscale.data.base import ImageDataset, row_numbers
from genscale.data.kept_clips import KeptCaptions, read_captions_kept
from genscale.data.latent_index import (
    INDEX,
    CacheIndex,
    check_shard,
    map_shard,
    read_index,
    shard_name,
)
from genscale.data.module import UNLABELLED, ImageDataModule, check_num_classes, mirrored
from genscale.errors import ConfigError, DataError, GenscaleError

if TYPE_CHECKING:
    from genscale.data.latent_index import CachePlan

_MAKE = "python -m genscale.cli.cache"
_SHOWN = 5  # names of shards in one sentence


class Latents(ImageDataset):
    """The moments of a data set's pictures, kept by ``python -m genscale.cli.cache``.

    Shards are mapped into memory when a row of theirs is first asked for; a worker process maps
    them anew. Pictures themselves are read from where they were, if they still are there.

    Args:
        root: folder of ``index.json`` and the shards.
        verify: what is checked at once. ``"sizes"``: every shard is there and has its size;
            ``"digests"``: every shard is read and holds what was written; ``"none"`` trusts the
            folder. A shard that is opened must belong to this cache in any case.
        name: word for logs; the name of the pictures' data set by default.

    Attributes:
        root: the folder.
        plan: what the shards hold.

    Raises:
        FileNotFoundError: there is no cache.
        DataError: it is unfinished or damaged.
        ConfigError: ``verify`` is not one of those above.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        verify: Literal["sizes", "digests", "none"] = "sizes",
        name: str | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        if verify not in ("sizes", "digests", "none"):
            raise ConfigError(f"data.verify='{verify}' is unknown. Choose sizes, digests or none.")
        self._index = _finished(self.root)
        self.plan: CachePlan = self._index.plan
        self.name = name or self.plan.data
        self.channels = self.plan.channels
        self.resolution = self.plan.resolution
        self.num_frames = self.plan.num_frames
        self.usual_frame_rate = self.plan.frame_rate
        self.class_names = self.plan.class_names
        self.num_classes = len(self.class_names)
        _verify(self.root, self._index, verify)
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self._source: ImageDataModule | None = None
        self._rows = torch.arange(self.plan.count)
        self._labels: Tensor | None = None
        if self.class_names:
            shards = range(self.plan.num_shards)
            parts = [map_shard(self.root, self.plan, i)["labels"] for i in shards]
            self._labels = torch.cat(parts)
        self.kept_captions: KeptCaptions | None = None
        if self.plan.captions is not None:
            self.kept_captions = read_captions_kept(self.root, self.plan.captions)
            self.captions = self.kept_captions.captions

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        # a map cannot be sent to another process
        return {**self.__dict__, "_mapped": {}, "_source": None}

    @property
    def labels(self) -> Tensor | None:
        """Class ids ``(n,)`` int64, or None."""
        return None if self._labels is None else self._labels[self._rows]

    def frame_rate(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the frames a second of some rows' clips: float32 ``(len(indices),)``."""
        rows = self._rows[row_numbers(indices, len(self))].tolist()
        size = self.plan.shard_size
        rates = [self._shard(row // size)["frame_rate"][row % size] for row in rows]
        return torch.stack(rates) if rates else torch.empty(0)

    def caption(self, index: int, *, mirrored: bool) -> str | None:
        """Return the caption of a row, mirrored or not; None where none are kept."""
        kept = self.kept_captions
        return None if kept is None else kept.of(int(self._rows[index]), mirrored=mirrored)

    def moments(self, indices: Tensor | Sequence[int], mirrored: Tensor | None = None) -> Tensor:
        """Return the moments of some rows: ``(len(indices), 2C, h, w)`` in the cache's dtype.

        Args:
            indices: rows, repeats allowed.
            mirrored: bool ``(len(indices),)``: which to take of the mirrored picture; None takes
                none.

        Raises:
            IndexError: if a row does not exist.
            DataError: a shard is damaged or foreign, or no mirrored latents are kept.
        """
        rows = self._rows[row_numbers(indices, len(self))]
        if mirrored is None:
            mirrored = torch.zeros(len(rows), dtype=torch.bool)
        elif bool(mirrored.any()) and not self.plan.flip:
            raise DataError(
                f"{self.root} keeps no mirrored latents. Set data.flip=false, or make the cache "
                "again with flip=true."
            )
        shards = rows.div(self.plan.shard_size, rounding_mode="floor")
        result: Tensor | None = None
        for number in sorted(set(shards.tolist())):
            mapped = self._shard(number)
            if result is None:
                result = mapped["moments"].new_empty(len(rows), *self.plan.shape)
            for name, side in (("moments", ~mirrored), ("mirrored", mirrored)):
                places = (side & (shards == number)).nonzero().flatten()
                if len(places):
                    result[places] = mapped[name][rows[places] - number * self.plan.shard_size]
        return torch.empty(0, *self.plan.shape) if result is None else result

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the pictures that the latents of some rows were made of; the fixed clip of videos.

        Raises:
            IndexError: if a row does not exist.
            DataError: the pictures are not where they were; see :meth:`source`.
        """
        rows = self._rows[row_numbers(indices, len(self))] // self.plan.clips_per_video
        return self.source().train.images(rows)

    def fingerprint(self) -> str:
        """Return the SHA-256 over the plan, all shards' digests and the rows."""
        digest = hashlib.sha256(self.plan.digest.encode())
        for record in self._index.shards:
            digest.update(record.sha256.encode())
        if len(self._rows) != self.plan.count:
            digest.update(self._rows.contiguous().numpy().data)
        return digest.hexdigest()

    def some(self, rows: Tensor) -> Latents:
        """Return some rows; the shards stay one file each."""
        part = copy.copy(self)
        part._rows = self._rows[row_numbers(rows, len(self))]
        part._mapped = {}
        if self.captions is not None:
            part.captions = [self.captions[row] for row in row_numbers(rows, len(self)).tolist()]
        return part

    def source(self) -> ImageDataModule:
        """Return the data module of the pictures that were encoded.

        Raises:
            DataError: they cannot be read, or are others by now.
        """
        if self._source is not None:
            return self._source
        advice = (
            f"The latents of {self.root} were made of them. Bring them back, or compare with a "
            "file: reference=<statistics or npz>."
        )
        try:
            module: ImageDataModule = build(self._index.source["data"], path="data")
        except (GenscaleError, OSError) as error:
            raise DataError(f"The pictures cannot be read: {error} {advice}") from error
        if module.train.fingerprint() != self.plan.fingerprint:
            raise DataError(
                f"The pictures of '{module.name}' have fingerprint "
                f"{module.train.fingerprint()[:12]}, and {self.plan.fingerprint[:12]} was "
                f"expected: they changed. {advice}"
            )
        self._source = module
        return module

    def problems_with(self, autoencoder: Autoencoder) -> list[str]:
        """Return a sentence where ``autoencoder`` is another than the one that made the cache.

        The encoder's weights are compared where the autoencoder has them; else scale, shift and
        sizes alone.
        """
        made = self.plan.autoencoder
        advice = (
            "Train with the autoencoder that made the latents, or make them again with: "
            f"{_MAKE} autoencoder=... out_dir=..."
        )
        if not isinstance(autoencoder, Variational):
            return [
                f"data.root={self.root} holds latents, but the autoencoder is "
                f"{type(autoencoder).__name__}, which has none. {advice}"
            ]
        for name, value in autoencoder.settings().items():
            if made.get(name) != value:
                return [
                    f"The latents in data.root={self.root} were made with autoencoder.{name}="
                    f"{made.get(name)}, but {value} was given. {advice}"
                ]
        digest = autoencoder.encoder_digest()
        if digest is not None and digest != made["encoder"]:
            return [
                f"The latents in data.root={self.root} were made by an encoder with weights "
                f"{made['encoder'][:12]}, but those of autoencoder.source are {digest[:12]}. "
                f"{advice}"
            ]
        return []

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._mapped:
            self._mapped[number] = map_shard(self.root, self.plan, number)
        return self._mapped[number]


def _finished(root: Path) -> CacheIndex:
    """Read the index of a finished cache."""
    index = read_index(root)
    if index is None:
        raise FileNotFoundError(
            f"No latents in data.root={root} (expected {INDEX} and latents-*.safetensors). "
            f"Make them with: {_MAKE} data=image_folder data.root=... autoencoder=sd_vae "
            f"autoencoder.source=... out_dir={root}"
        )
    plan = index.plan
    if len(index.shards) != plan.num_shards:
        there = sum((root / shard_name(i)).is_file() for i in range(plan.num_shards))
        raise DataError(
            f"The cache in data.root={root} is unfinished: {there} of {plan.num_shards} shards "
            "are there. Run the command that makes it again; it goes on where it stopped."
        )
    return index


def _verify(root: Path, index: CacheIndex, verify: str) -> None:
    """Raise a ``DataError`` that names the shards that are missing or damaged."""
    wrong: list[str] = []
    if verify != "none":
        for record in index.shards:
            file = root / record.file
            size = file.stat().st_size if file.is_file() else None
            if size != record.bytes:
                told = "missing" if size is None else f"{size} bytes, not {record.bytes}"
                wrong.append(f"{record.file} ({told})")
    if verify == "digests" and not wrong:
        for number in range(index.plan.num_shards):
            if check_shard(root, index.plan, number) != index.shards[number]:
                wrong.append(f"{shard_name(number)} (other content)")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise DataError(
            f"{len(wrong)} of {len(index.shards)} shards in data.root={root} are not as written: "
            f"{', '.join(wrong[:_SHOWN])}{more}. Delete them, and run the command that made the "
            "cache again; it makes what is missing."
        )


class LatentDataModule(ImageDataModule):
    """Feeds a training run with cached moments instead of pictures.

    Args:
        train: the cache.
        batch_size: see :class:`~genscale.data.module.ImageDataModule`, as all below.
        num_workers: processes that read ahead.
        flip: take the mirrored latents of a sample with probability 1/2, by the draw that would
            mirror its picture; None does so where they are kept.
        seed: the run's seed.
        limit: train on so many rows only.
        name: word for run folders.

    Raises:
        ConfigError: mirrored latents are asked for and not kept.
    """

    train: Latents

    def __init__(
        self,
        train: Latents,
        *,
        batch_size: int,
        num_workers: int = 0,
        flip: bool | None = None,
        seed: int = 0,
        limit: int | None = None,
        name: str | None = None,
    ) -> None:
        if flip and not train.plan.flip:
            raise ConfigError(
                f"data.flip=true, but {train.root} keeps no mirrored latents. Set "
                "data.flip=false, or make the cache again with flip=true."
            )
        super().__init__(
            train,
            batch_size=batch_size,
            num_workers=num_workers,
            flip=train.plan.flip if flip is None else flip,
            seed=seed,
            limit=limit,
            name=name,
        )

    @property
    def frame_rate(self) -> float:
        """Frames a second that samples of clips are made for."""
        return self.train.usual_frame_rate

    def samples(self) -> Dataset[dict[str, Any]]:
        """Return what reads batches of ``moments``, ``label`` and ``position``.

        Of clips there is ``frame_rate``, too, and with captions ``caption``.
        """
        return _Moments(self.train, self.seed, self.flip, self.with_captions)

    def pictures(self) -> ImageDataModule:
        """Return the module of the pictures that were encoded; see :meth:`Latents.source`."""
        return self.train.source()


class _Moments(Dataset[dict[str, Any]]):
    """Turns (position, row) pairs into a batch of moments."""

    def __init__(self, latents: Latents, seed: int, flip: bool, with_captions: bool) -> None:
        self._latents = latents
        self._labels = latents.labels
        self._seed = seed
        self._flip = flip
        self._with_captions = with_captions and latents.captions is not None

    def __len__(self) -> int:
        return len(self._latents)

    def __getitem__(self, pair: tuple[int, int]) -> dict[str, Any]:
        return {name: value[0] for name, value in self.__getitems__([pair]).items()}

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        position, rows = torch.tensor(pairs, dtype=torch.int64).unbind(1)
        which = mirrored(self._seed, position) if self._flip else None
        labels = self._labels
        label = torch.full_like(rows, UNLABELLED) if labels is None else labels[rows]
        moments = self._latents.moments(rows, which)
        batch: dict[str, Any] = {"moments": moments, "label": label, "position": position}
        if self._latents.num_frames:
            batch["frame_rate"] = self._latents.frame_rate(rows)
        if self._with_captions:
            turned = [False] * len(rows) if which is None else which.tolist()
            batch["caption"] = [
                self._latents.caption(row, mirrored=side)
                for row, side in zip(rows.tolist(), turned, strict=True)
            ]
        return batch


def latents_module(
    *,
    name: str | None,
    root: str | None,
    resolution: int | None,
    channels: int | None,
    num_classes: int | None,
    verify: Literal["sizes", "digests", "none"],
    flip: bool | None,
    num_workers: int,
    batch_size: int,
    seed: int,
    limit: int | None = None,
    num_frames: int | None = None,
) -> LatentDataModule:
    """Build the data module of ``data=latents``; the arguments are the keys of its YAML.

    Args:
        name: word for run folders.
        root: folder of the cache; must be set.
        resolution: of the pictures; checked against the cache, None takes it.
        channels: likewise.
        num_classes: likewise.
        verify: see :class:`Latents`.
        flip: see :class:`LatentDataModule`.
        num_workers: reading processes.
        batch_size: samples of one optimizer step.
        seed: the run's seed.
        limit: train on so many rows only.
        num_frames: of the clips; checked against the cache, None takes it.

    Raises:
        ConfigError: ``root`` is not set, or a size is not the cache's.
        FileNotFoundError: there is no cache.
        DataError: it is unfinished or damaged.
    """
    if root is None:
        raise ConfigError(
            f"data.root is not set, and data={name or 'latents'} needs the folder of a cache. "
            f"Give data.root=/path/to/cache; make one with: {_MAKE}"
        )
    latents = Latents(root, verify=verify, name=name)
    stated_sizes = (("resolution", resolution), ("channels", channels), ("num_frames", num_frames))
    for what, stated in stated_sizes:
        if stated is not None and stated != getattr(latents, what):
            raise ConfigError(
                f"data.{what}={stated}, but the latents in {root} were made of pictures with "
                f"{what} {getattr(latents, what)}. Leave data.{what} out."
            )
    check_num_classes(latents, num_classes)
    return LatentDataModule(
        latents,
        batch_size=batch_size,
        num_workers=num_workers,
        flip=flip,
        seed=seed,
        limit=limit,
        name=name,
    )
