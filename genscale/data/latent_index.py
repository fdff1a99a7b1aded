"""What a cache of latents holds: its index, and shards that name the plan they belong to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genscale.errors import DataError
from genscale.io.files import atomic_write, write_json

INDEX = "index.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_FORMAT = 1
_OF_CLIPS = ("num_frames", "frame_rate", "clips_per_video", "clip_seed", "captions")


@dataclass(frozen=True)
class CachePlan:
    """Everything that decides what the shards of a cache hold.

    Args:
        data: name of the data set.
        fingerprint: SHA-256 of its pictures, labels and crop.
        count: number of pictures.
        resolution: their height and width in pixels.
        channels: their channels.
        class_names: one name a class; empty for an unlabelled set.
        autoencoder: its settings and, as ``encoder``, the digest of its encoder's weights.
        shape: of one picture's moments, ``(2C, h, w)``, of a clip's ``(2C, t, h, w)``; C channels
            where means alone are kept.
        flip: moments of the mirrored picture are kept too.
        dtype: ``float16``, ``bfloat16`` or ``float32``.
        shard_size: pictures a shard.
        tf32: matrix products were allowed 10-bit mantissas on CUDA.
        num_frames: frames of a clip; 0 for pictures.
        frame_rate: frames a second that samples of such clips are made for; 0 for pictures.
        clips_per_video: rows of the cache for each row of the data.
        clip_seed: of the keys that chose all clips of a video but its first.
        captions: SHA-256 of the captions kept beside the shards, or None.
    """

    data: str
    fingerprint: str
    count: int
    resolution: int
    channels: int
    class_names: tuple[str, ...]
    autoencoder: dict[str, Any]
    shape: tuple[int, ...]
    flip: bool
    dtype: str
    shard_size: int
    tf32: bool
    num_frames: int = 0
    frame_rate: float = 0.0
    clips_per_video: int = 1
    clip_seed: int = 0
    captions: str | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all of it; every shard carries it."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """Return all of it by name; what only clips have is left out for pictures."""
        whole = asdict(self)
        return {
            name: value for name, value in whole.items() if self.num_frames or name not in _OF_CLIPS
        }

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    def rows(self, shard: int) -> range:
        """Return the rows of the data set that a shard holds."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.count))

    def difference(self, other: CachePlan) -> str | None:
        """Return how another plan differs, in words: ``dtype=float16, not float32``."""
        ours, theirs = _flat(self.content()), _flat(other.content())
        for name in (*ours, *theirs):
            mine, its = ours.get(name), theirs.get(name)
            if mine != its:
                return f"{name}={_short(mine)}, not {_short(its)}"
        return None


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    inner = fields.pop("autoencoder")
    return {**fields, **{f"autoencoder.{name}": value for name, value in inner.items()}}


def _short(value: Any) -> str:
    text = str(value)
    is_digest = isinstance(value, str) and len(text) == 64
    return text[:12] if is_digest else text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard as the index lists it.

    Args:
        file: its name.
        count: pictures in it.
        bytes: size of the file.
        sha256: of the file.
    """

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CacheIndex:
    """The content of ``index.json``: written with no shards at the start, with all at the end.

    Args:
        plan: what the shards hold.
        source: config nodes ``data`` and ``autoencoder`` of the command that made them.
        shards: one record a shard; empty until the last is finished.
    """

    plan: CachePlan
    source: dict[str, Any]
    shards: tuple[ShardRecord, ...] = ()

    def write(self, folder: Path) -> None:
        """Write ``index.json``, atomically."""
        content = {
            "format": _FORMAT,
            "plan_sha256": self.plan.digest,
            "num_classes": len(self.plan.class_names),
            **self.plan.content(),
            "source": self.source,
            "shards": [asdict(record) for record in self.shards],
        }
        write_json(folder / INDEX, content)


def read_index(folder: Path) -> CacheIndex | None:
    """Read ``index.json``; None where there is none.

    Raises:
        DataError: it is damaged, or of another version.
    """
    file = folder / INDEX
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise DataError(
                f"{file} has format {content['format']}, and this version reads {_FORMAT}. "
                "Make the cache again."
            )
        of_clips = _OF_CLIPS if content.get("num_frames") else ()
        fields = {
            name: content[name]
            for name in CachePlan.__dataclass_fields__
            if name not in _OF_CLIPS or name in of_clips
        }
        for name in ("class_names", "shape"):
            fields[name] = tuple(fields[name])
        plan = CachePlan(**fields)
        shards = tuple(ShardRecord(**record) for record in content["shards"])
        index = CacheIndex(plan, content["source"], shards)
        stated = content["plan_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is damaged ({type(error).__name__}: {error}). Make the cache again."
        ) from error
    if stated != plan.digest:
        raise DataError(
            f"{file} was changed by hand: its entries do not give the plan {stated[:12]} that its "
            "shards belong to. Bring the original back, or make the cache again."
        )
    return index


def shard_name(number: int) -> str:
    """Return a shard's file name."""
    return f"latents-{number:05d}.safetensors"


def write_shard(
    folder: Path, plan: CachePlan, number: int, tensors: dict[str, Tensor]
) -> ShardRecord:
    """Write one shard atomically, with the plan it belongs to and a digest of what it holds.

    Args:
        folder: of the cache.
        plan: its plan.
        number: of the shard, from 0.
        tensors: ``moments`` ``(n, 2C, h, w)``, and where the plan has them ``mirrored`` of that
            shape, ``labels`` int64 ``(n,)`` and, of clips, ``frame_rate`` float32 ``(n,)``.
    """
    from safetensors.torch import save

    header = {"plan": plan.digest, "shard": number, "sha256": _payload_digest(tensors)}
    path = folder / shard_name(number)
    with atomic_write(path) as temporary:
        # one entry only: their order in the file is not defined
        temporary.write_bytes(save(tensors, metadata={"genscale": json.dumps(header)}))
    return _record(path, len(plan.rows(number)))


def check_shard(folder: Path, plan: CachePlan, number: int) -> ShardRecord:
    """Read a whole shard and return its record.

    Raises:
        DataError: it is damaged, or belongs to another cache.
    """
    tensors, stated = _open(folder / shard_name(number), plan, number)
    if _payload_digest(tensors) != stated:
        raise _damaged(folder / shard_name(number), "its content is not what was written")
    return _record(folder / shard_name(number), len(plan.rows(number)))


def map_shard(folder: Path, plan: CachePlan, number: int) -> dict[str, Tensor]:
    """Map a shard into memory: pages are read when their rows are, and never written.

    Raises:
        DataError: it is damaged, or belongs to another cache.
    """
    return _open(folder / shard_name(number), plan, number)[0]


def _open(path: Path, plan: CachePlan, number: int) -> tuple[dict[str, Tensor], str]:
    """Map a shard's tensors and hold names, shapes and plan against what is expected."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"{path} is missing. Run the command that made the cache again.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = json.loads((file.metadata() or {}).get("genscale", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    if header.get("plan") != plan.digest or header.get("shard") != number:
        raise DataError(
            f"{path} is foreign: it was made from other data, by another autoencoder or with other "
            "settings than index.json states. Move it away, and run the command that made the "
            "cache again."
        )
    count = len(plan.rows(number))
    moments = ((count, *plan.shape), DTYPES[plan.dtype])
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"moments": moments}
    if plan.flip:
        expected["mirrored"] = moments
    if plan.class_names:
        expected["labels"] = ((count,), torch.int64)
    if plan.num_frames:
        expected["frame_rate"] = ((count,), torch.float32)
    found = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    if found != expected:
        raise _damaged(path, f"it holds {found}, and {expected} was expected")
    return tensors, str(header.get("sha256"))


def _payload_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _record(path: Path, count: int) -> ShardRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardRecord(path.name, count, path.stat().st_size, digest)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} is damaged: {what.rstrip('.')}. Delete it, and run the command that made the "
        "cache again; it makes what is missing."
    )
