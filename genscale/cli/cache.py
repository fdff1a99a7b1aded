"""``python -m genscale.cli.cache``: the moments of every picture of a data set, in shards."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from genscale.cli.app import instantiate, main
from genscale.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from genscale.autoencoders.base import Variational
    from genscale.data.base import ImageDataset
    from genscale.data.kept_clips import KeptCaptions
    from genscale.data.latent_index import CachePlan, ShardRecord
    from genscale.data.module import ImageDataModule


def run(cfg: DictConfig) -> None:
    """Encode what is missing of ``cfg.out_dir``; the index lists every shard at the end."""
    from genscale import dist
    from genscale.data.latent_index import CacheIndex, read_index

    _check(cfg)
    rank, world_size = dist.initialise()
    folder = Path(cfg.out_dir).expanduser()
    datamodule = instantiate(cfg.data, "data")
    autoencoder = _autoencoder(cfg, datamodule)
    captions = _captions(cfg, datamodule.train)
    plan = _plan(cfg, datamodule.train, autoencoder, None if captions is None else captions.digest)
    _refuse_other(folder, plan)
    index = CacheIndex(plan, _source(cfg))
    present = _present(folder, plan, rank)
    if rank == 0 and read_index(folder) is None:
        index.write(folder)
    if rank == 0 and captions is not None:
        captions.write(folder)
    records = _verified(folder, plan, present[rank::world_size])
    missing = [number for number in range(plan.num_shards) if number not in set(present)]
    records |= _encode(cfg, plan, folder, datamodule, autoencoder, missing[rank::world_size], rank)
    parts = dist.gather_objects(records)
    if rank == 0:
        every: dict[int, ShardRecord] = {}
        for part in parts:
            every |= part
        CacheIndex(plan, index.source, tuple(every[i] for i in sorted(every))).write(folder)
        size = _shown(sum(record.bytes for record in every.values()))
        what = "clips" if plan.num_frames else "pictures"
        print(
            f"{plan.count} {what} in {len(every)} shards, {size}"
            f"{f' ({len(present)} shards were there)' if present else ''}: {folder}"
        )
        words = "snap_video data=video_latents" if plan.num_frames else "dit data=latents"
        print(f"train: python train.py model={words} data.root={folder} {_words(cfg)}")
    dist.finish()


def _check(cfg: DictConfig) -> None:
    """Raise one error for everything that is wrong in the settings."""
    from genscale.cli.numbers import number_problems
    from genscale.data.latent_index import DTYPES

    lowest = {"shard_size": 1, "batch_size": 1, "clips_per_video": 1, "seed": None}
    problems = number_problems(cfg, lowest)
    if cfg.keep not in ("moments", "mode"):
        problems.append(f"keep must be moments or mode, but '{cfg.keep}' was given.")
    if cfg.out_dir is None:
        problems.append("out_dir is not set. Give out_dir=<folder of the latents>.")
    if cfg.dtype not in DTYPES:
        problems.append(
            f"dtype must be one of {', '.join(DTYPES)}, but '{cfg.dtype}' was given."
            f"{did_you_mean(str(cfg.dtype), list(DTYPES))}"
        )
    for name in ("flip", "tf32"):
        if not isinstance(cfg[name], bool):
            problems.append(f"{name} must be true or false, but {cfg[name]!r} was given.")
    if problems:
        raise ConfigError("\n".join(problems))


def _autoencoder(cfg: DictConfig, datamodule: ImageDataModule) -> Variational:
    """Build the autoencoder on its device and see that it can encode the pictures."""
    import torch

    from genscale.autoencoders.base import Variational
    from genscale.cli.autoencoding import channel_problems, clip_problems
    from genscale.data.latents import LatentDataModule
    from genscale.pipeline import choose_device

    if isinstance(datamodule, LatentDataModule):
        raise ConfigError(
            f"data.root={cfg.data.root} holds latents already. Give the data they were made of."
        )
    autoencoder = instantiate(cfg.autoencoder, "autoencoder")
    if not isinstance(autoencoder, Variational):
        raise ConfigError(
            f"autoencoder={type(autoencoder).__name__} has no moments to keep. Choose one that "
            "has, e.g. autoencoder=sd_vae."
        )
    problems = autoencoder.check(encodes=True, decodes=False)
    problems += channel_problems(autoencoder, datamodule.channels)
    problems += clip_problems(autoencoder, datamodule.num_frames)
    if cfg.clips_per_video > 1 and not datamodule.num_frames:
        problems.append(
            f"clips_per_video={cfg.clips_per_video}, but '{datamodule.name}' holds pictures. "
            "Leave it out."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = cfg.tf32
    torch.backends.cudnn.deterministic = True  # a resumed cache has the bytes of any other
    return autoencoder.eval().to(choose_device(cfg.device))


def _captions(cfg: DictConfig, images: ImageDataset) -> KeptCaptions | None:
    """Return the captions to be kept; those of pictures are read from their data."""
    from genscale.data.clips import ClipDataset
    from genscale.data.kept_clips import KeptClips

    if not isinstance(images, ClipDataset):
        return None
    return KeptClips(images, cfg.clips_per_video, cfg.seed).captions(mirrored=cfg.flip)


def _plan(
    cfg: DictConfig, images: ImageDataset, autoencoder: Variational, captions: str | None
) -> CachePlan:
    from genscale.data.latent_index import CachePlan

    side, rest = divmod(images.resolution, autoencoder.downsample)
    if rest:
        raise ConfigError(
            f"data.resolution={images.resolution} does not divide by autoencoder.downsample="
            f"{autoencoder.downsample}. Give a multiple of it."
        )
    return CachePlan(
        data=images.name,
        fingerprint=images.fingerprint(),
        count=len(images) * cfg.clips_per_video,
        resolution=images.resolution,
        channels=images.channels,
        class_names=images.class_names,
        autoencoder={**autoencoder.settings(), "encoder": autoencoder.encoder_digest()},
        shape=(
            autoencoder.latent_channels if cfg.keep == "mode" else autoencoder.moment_channels,
            *((autoencoder.frames_to_latent(images.num_frames),) if images.num_frames else ()),
            *(side, side),
        ),
        flip=cfg.flip,
        dtype=cfg.dtype,
        shard_size=cfg.shard_size,
        tf32=cfg.tf32,
        num_frames=images.num_frames,
        frame_rate=getattr(images, "usual_frame_rate", 0.0),
        clips_per_video=cfg.clips_per_video,
        clip_seed=cfg.seed if cfg.clips_per_video > 1 else 0,
        captions=captions,
    )


def _source(cfg: DictConfig) -> dict[str, Any]:
    """Return the nodes that made the cache; folders are written so that they hold anywhere."""
    source: dict[str, Any] = {}
    for group in ("data", "autoencoder"):
        node: dict[str, Any] = OmegaConf.to_container(cfg[group], resolve=True)  # type: ignore[assignment]
        for key, value in node.items():
            if isinstance(value, str) and key.endswith(("root", "source")):
                path = Path(value).expanduser()
                node[key] = str(path.absolute()) if path.exists() else value
        source[group] = node
    return source


def _refuse_other(folder: Path, plan: CachePlan) -> None:
    """Raise where ``folder`` belongs to another cache, or to something else."""
    from genscale.data.latent_index import read_index

    index = read_index(folder)
    if index is not None and index.plan != plan:
        raise DataError(
            f"out_dir={folder} is a cache with {index.plan.difference(plan)}. Give another "
            "out_dir, or the settings of that cache to go on with it."
        )
    if index is None and any(folder.glob("latents-*.safetensors")):
        raise DataError(
            f"out_dir={folder} holds shards without an index.json, which says what they are. "
            "Bring it back, or give another out_dir."
        )


def _present(folder: Path, plan: CachePlan, rank: int) -> list[int]:
    """Return the shards that are there; the first process looks, and all agree."""
    from genscale import dist
    from genscale.data.latent_index import shard_name

    found = []
    if rank == 0 and folder.is_dir():
        for torn in folder.glob(".latents-*.safetensors"):
            torn.unlink()  # of a process that was killed while it wrote
        found = [i for i in range(plan.num_shards) if (folder / shard_name(i)).exists()]
    return list(dist.gather_objects(found)[0])


def _verified(folder: Path, plan: CachePlan, numbers: Sequence[int]) -> dict[int, ShardRecord]:
    """Read shards of an earlier run whole; damaged and foreign ones are told on all processes."""
    from genscale import dist
    from genscale.data.latent_index import check_shard

    records, problems = {}, []
    for number in numbers:
        try:
            records[number] = check_shard(folder, plan, number)
        except DataError as error:
            problems.append(str(error))
    everywhere = [text for part in dist.gather_objects(problems) for text in part]
    if everywhere:
        raise DataError("\n".join(everywhere))
    return records


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Moments of a batch of rows ``ids`` of one shard, and of their mirror images.

    Of clips, ``parts`` has their ``frame_rate``, too.
    """

    ids: Tensor
    shard: int
    parts: dict[str, Tensor]


def _encode(
    cfg: DictConfig,
    plan: CachePlan,
    folder: Path,
    datamodule: ImageDataModule,
    autoencoder: Variational,
    numbers: Sequence[int],
    rank: int,
) -> dict[int, ShardRecord]:
    """Make shards, one after the other; each is written as soon as its last batch is encoded."""
    import torch

    from genscale.cli.progress import track
    from genscale.data.latent_index import write_shard

    records: dict[int, ShardRecord] = {}
    waiting: list[_Encoded] = []
    total = sum(len(plan.rows(number)) for number in numbers)
    batches = _batches(cfg, plan, datamodule, autoencoder, numbers)
    labels = datamodule.train.labels
    if labels is not None:
        labels = labels.repeat_interleave(plan.clips_per_video)
    for batch in track(batches, "encoding", total=total, show=rank == 0):
        waiting.append(batch)
        rows = plan.rows(batch.shard)
        if int(batch.ids[-1]) != rows[-1]:
            continue
        names = waiting[0].parts
        tensors = {name: torch.cat([part.parts[name] for part in waiting]) for name in names}
        if labels is not None:
            tensors["labels"] = labels[rows.start : rows.stop].clone()
        records[batch.shard] = write_shard(folder, plan, batch.shard, tensors)
        waiting.clear()
    return records


def _batches(
    cfg: DictConfig,
    plan: CachePlan,
    datamodule: ImageDataModule,
    autoencoder: Variational,
    numbers: Sequence[int],
) -> Iterator[_Encoded]:
    """Encode batches in order; none spans two shards, so a shard's bytes depend on it alone."""
    import torch
    from torch.utils.data import DataLoader

    from genscale.autoencoders.frames import on_clips
    from genscale.data.latent_index import DTYPES
    from genscale.io.images import from_uint8
    from genscale.pipeline import choose_device

    device, dtype = choose_device(cfg.device), DTYPES[plan.dtype]
    lists = [
        list(rows[start : start + cfg.batch_size])
        for rows in map(plan.rows, numbers)
        for start in range(0, len(rows), cfg.batch_size)
    ]
    loader: DataLoader[Any] = DataLoader(
        _Pictures(datamodule.train, plan),  # type: ignore[arg-type]  # has what the loader asks for
        batch_sampler=lists,
        num_workers=datamodule.num_workers if lists else 0,
        collate_fn=_keep,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # of the workers' seeds, which nothing reads
    )
    for rows, (pixels, rates) in zip(lists, loader, strict=True):
        images = from_uint8(pixels.to(device, non_blocking=True))
        with torch.inference_mode():
            parts = {"moments": on_clips(autoencoder, autoencoder.moments, images)}
            if plan.flip:
                parts["mirrored"] = on_clips(autoencoder, autoencoder.moments, images.flip(-1))
        width = plan.shape[0]  # means come first
        kept = {
            name: value[:, :width].to(dtype).cpu().contiguous() for name, value in parts.items()
        }
        if not all(bool(value.isfinite().all()) for value in kept.values()):
            raise DataError(
                f"The moments of rows {rows[0]} to {rows[-1]} are not finite in {plan.dtype}. "
                "Give dtype=float32, or look at these pictures."
            )
        if rates is not None:
            kept["frame_rate"] = rates
        ids = torch.tensor(rows)
        yield _Encoded(ids, rows[0] // plan.shard_size, kept)


class _Pictures:
    """Reads a batch of pictures at once, in the reading processes."""

    def __init__(self, images: ImageDataset, plan: CachePlan) -> None:
        from genscale.data.clips import ClipDataset
        from genscale.data.kept_clips import KeptClips

        self._images = images
        self._clips: KeptClips | None = None
        if isinstance(images, ClipDataset):
            self._clips = KeptClips(images, plan.clips_per_video, plan.clip_seed)

    def __len__(self) -> int:
        return len(self._images) if self._clips is None else len(self._clips)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor | None]:
        return self.__getitems__([row])

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        # the loader fetches a whole batch through this method where a data set has it
        if self._clips is None:
            return self._images.images(rows), None
        return self._clips.read(rows)


def _keep(batch: Any) -> Any:
    """Collate nothing: ``_Pictures`` returns whole batches."""
    return batch


def _shown(size: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _words(cfg: DictConfig) -> str:
    """Return the words of a training command that name the autoencoder of this cache."""
    from hydra.core.hydra_config import HydraConfig

    option = HydraConfig.get().runtime.choices["autoencoder"]
    told = ("source", "subfolder", "downsample", "temporal_downsample")
    given = [(key, cfg.autoencoder.get(key)) for key in told]
    words = [f"autoencoder.{key}={value}" for key, value in given if value is not None]
    return " ".join([f"autoencoder={option}", *words])


if __name__ == "__main__":
    sys.exit(main("cache", "genscale.cli.cache:run"))
