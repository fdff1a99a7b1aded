"""The data module of a folder of videos, as its YAML describes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from genscale.data.caption_files import Captions
from genscale.data.clip_cutting import Begin, Crop, Filter, Short
from genscale.data.clips import ClipDataModule
from genscale.data.image_folder import ImageFolder
from genscale.data.module import check_num_classes
from genscale.data.video_folder import VideoFolder
from genscale.data.video_reader import Backend
from genscale.errors import ConfigError


def video_folder_module(
    *,
    name: str,
    root: str | None,
    resolution: int,
    num_frames: int,
    frame_rate: float | Sequence[float] | None,
    channels: int,
    num_classes: int | None,
    labels: Literal["folders", "none"],
    captions: Captions,
    backend: Backend,
    exact: bool,
    assumed_rate: float,
    verify: Literal["headers", "frames", "none"],
    damaged: Literal["error", "skip"],
    short: Short,
    begin: Begin,
    crop: Crop,
    resize: Filter,
    heldout_root: str | None,
    heldout_fraction: float,
    image_root: str | None,
    image_ratio: float,
    flip: bool,
    num_workers: int,
    batch_size: int,
    seed: int,
    limit: int | None = None,
) -> ClipDataModule:
    """Build the data module of ``data=video_folder``; the arguments are the keys of its YAML.

    Args:
        name: word for run folders.
        root: folder of the training videos; must be set.
        resolution: see :class:`~genscale.data.video_folder.VideoFolder`, as all up to ``resize``.
        num_frames: likewise.
        frame_rate: likewise.
        channels: likewise.
        num_classes: checked against the class folders; None counts them.
        labels: likewise.
        captions: likewise.
        backend: likewise.
        exact: likewise.
        assumed_rate: likewise.
        verify: likewise.
        damaged: likewise.
        short: likewise.
        begin: likewise.
        crop: likewise.
        resize: likewise.
        heldout_root: folder of the held-out videos, laid out as ``root``, or None.
        heldout_fraction: share of ``root`` to hold out instead; 0 holds nothing out.
        image_root: folder of still pictures to mix in, or None.
        image_ratio: share of samples that are still pictures.
        flip: mirror samples at random.
        num_workers: reading processes.
        batch_size: samples of one optimizer step.
        seed: the run's seed.
        limit: train on the fixed clips of so many videos only.

    Raises:
        ConfigError: ``root`` is not set, both ways of holding out are used, or the number of
            classes is another.
        DataError: a folder is missing, empty or damaged.
        ImportError: there are video files, and nothing decodes them.
    """
    if root is None:
        raise ConfigError(
            f"data.root is not set, and data={name} needs the folder of its videos. "
            "Give data.root=/path/to/videos (one folder a class, or data.labels=none)."
        )
    if heldout_root is not None and heldout_fraction:
        raise ConfigError(
            f"data.heldout_root={heldout_root} and data.heldout_fraction={heldout_fraction} both "
            "say what is held out. Set one of them."
        )

    def read(folder: str) -> VideoFolder:
        return VideoFolder(
            folder,
            resolution,
            num_frames,
            frame_rate=frame_rate,
            channels=channels,
            labels=labels,
            captions=captions,
            backend=backend,
            exact=exact,
            assumed_rate=assumed_rate,
            verify=verify,
            damaged=damaged,
            short=short,
            begin=begin,
            crop=crop,
            resize=resize,
            name=name,
        )

    train, heldout = read(root), None
    check_num_classes(train, num_classes)
    if heldout_root is not None:
        heldout = read(heldout_root)
    elif heldout_fraction:
        train, heldout = train.split(heldout_fraction)
    images = None
    if image_root is not None:
        images = ImageFolder(image_root, resolution, channels=channels, labels="none")
    return ClipDataModule(
        train,
        heldout,
        images=images,
        image_ratio=image_ratio,
        name=name,
        batch_size=batch_size,
        num_workers=num_workers,
        flip=flip,
        seed=seed,
        limit=limit,
    )
