"""Moving sprites as a data set: clips drawn when asked for, captions written when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from genscale import rng
from genscale.data.base import check_resolution, row_numbers
from genscale.data.captioned import WrittenCaptions, check_tasks
from genscale.data.clips import ClipDataset
from genscale.data.scenes.renderer import HIGHEST, LOWEST
from genscale.data.sprites.grammar import MAX_SPRITES, SPRITE_TASKS, SpriteTask, mirrored_caption
from genscale.data.sprites.renderer import render_clip
from genscale.data.sprites.sampling import CaptionedClip, clip_at
from genscale.errors import ConfigError

if TYPE_CHECKING:
    from genscale.data.module import ImageDataModule

SLOWEST_RATE, FASTEST_RATE = 4.0, 120.0  # frames a second; below, fast objects would be ambiguous
_LATEST = 8.0  # seconds: clips in training begin at any time up to this where objects never meet
_AT_LEAST = 1.0  # seconds in which objects of any data set do not touch
_PROBES = 16  # rows that go into the fingerprint


class MovingSprites(ClipDataset):
    """Clips of moving coloured shapes, with captions that say everything about them.

    Row i is a function of (seed, i), of the tasks and of the length of clips alone: another
    resolution shows the same motion, a larger ``count`` has the same first rows. Nothing is drawn
    before it is asked for, and nothing is kept.

    Args:
        count: number of rows.
        split: ``"train"`` or ``"heldout"``: two sets without a common key.
        resolution: 16 to 512 pixels; the tracker reads clips exactly from 32 pixels on.
        num_frames: frames of a clip; 0 makes this a data set of still pictures ``(C, H, W)``, the
            first frames, whose captions name no motion.
        frame_rates: frames a second, 4 to 120; each clip has one of them.
        tasks: kinds of captions: ``motion``, ``count``, ``pair``, ``speed``, ``still``,
            ``bounce``.
        max_objects: objects of a clip at most, 1 to 4.
        seed: key of the data set; no concern of a run's seed.

    Raises:
        ConfigError: if an argument is not one of those above.
    """

    def __init__(
        self,
        count: int,
        *,
        split: Literal["train", "heldout"] = "train",
        resolution: int = 32,
        num_frames: int = 8,
        frame_rates: Sequence[float] = (8.0,),
        tasks: Sequence[SpriteTask] = SPRITE_TASKS,
        max_objects: int = 3,
        seed: int = 0,
    ) -> None:
        if split not in ("train", "heldout"):
            raise ConfigError(
                f"split='{split}' is unknown. Moving sprites have 'train' and 'heldout'."
            )
        if count < 1 or seed < 0 or num_frames < 0:
            raise ConfigError(
                f"Clips of data.count={count}, data.num_frames={num_frames} and data.sprite_seed="
                f"{seed} cannot be drawn. Give a count of at least 1, 0 frames (pictures) or more, "
                "and a seed of at least 0."
            )
        if not 1 <= max_objects <= MAX_SPRITES:
            raise ConfigError(
                f"data.max_objects={max_objects} is outside 1 to {MAX_SPRITES}, the numbers a "
                "caption can count to. Choose one of them."
            )
        check_resolution(resolution, LOWEST, HIGHEST, "moving sprites")
        self.tasks = check_tasks(tasks, SPRITE_TASKS, " of moving sprites")
        self.frame_rates = _check_rates(frame_rates)
        self.max_objects = max_objects
        self.name = "moving_sprites"
        self.channels = 3
        self.resolution = resolution
        self.num_classes = 0
        self.class_names = ()
        self.num_frames = num_frames
        self.usual_frame_rate = self.frame_rates[0]
        self.horizon = max(_AT_LEAST, num_frames / min(self.frame_rates))
        self.captions = WrittenCaptions(count, self._caption)
        self._key = 2 * seed + (split == "heldout")
        self._count = count

    def __len__(self) -> int:
        return self._count

    @property
    def labels(self) -> None:
        """None: clips have captions in place of classes."""
        return None

    def captioned(self, index: int) -> CaptionedClip:
        """Return what moves in a row with its caption and kind.

        Raises:
            IndexError: if there is no such row.
        """
        row = int(row_numbers([index], len(self)))
        return clip_at(self._key, row, self.tasks, self.max_objects, self.horizon)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the clips of some rows from time 0 on, or the pictures of a set without frames.

        Returns:
            uint8 ``(n, 3, T, H, W)``, or ``(n, 3, H, W)`` where :attr:`num_frames` is 0.
        """
        rows = row_numbers(indices, len(self))
        clips = self._draw(rows, torch.zeros(len(rows)), self.frame_rate(rows))
        return clips if self.num_frames else clips[:, :, 0]

    def frame_rate(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the frames a second of each row, one of :attr:`frame_rates`."""
        rows = row_numbers(indices, len(self))
        return self._choose_rate(rng.uniform(rng.key(self._key, rows, rng.Purpose.CLIP)))

    def clips(self, indices: Tensor | Sequence[int], keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return clips that begin at any time and have any of the frame rates.

        Objects that will meet are shown before they do. See :meth:`ClipDataset.clips`.
        """
        rows = row_numbers(indices, len(self))
        draws = rng.uniform(keys, (2,))
        rates = self._choose_rate(draws[:, 0])
        latest = torch.tensor([self.captioned(row).scene.lifetime for row in rows.tolist()])
        latest = (latest - self.num_frames / rates).clamp(0.0, _LATEST)
        return self._draw(rows, latest * draws[:, 1], rates), rates

    def mirrored_caption(self, caption: str) -> str:
        """Return a caption with left and right changed."""
        return mirrored_caption(caption)

    def _caption(self, row: int) -> str:
        clip = self.captioned(row)
        return clip.caption if self.num_frames else str(clip.requirement.unmoved())

    def _choose_rate(self, draws: Tensor) -> Tensor:
        rates = torch.tensor(self.frame_rates, dtype=torch.float32)
        return rates[(draws * len(rates)).long().clamp_(max=len(rates) - 1)]

    def _draw(self, rows: Tensor, starts: Tensor, rates: Tensor) -> Tensor:
        frames = max(1, self.num_frames)
        clips = torch.empty(len(rows), 3, frames, *2 * (self.resolution,), dtype=torch.uint8)
        for i, (row, start, rate) in enumerate(
            zip(rows.tolist(), starts.tolist(), rates.tolist(), strict=True)
        ):
            times = start + np.arange(frames) / rate
            clip = render_clip(self.captioned(row).scene, times, self.resolution)
            clips[i] = torch.from_numpy(clip)
        return clips

    def fingerprint(self) -> str:
        """Return the SHA-256 over what fixes every row, and over the frames of a few."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        settings = (
            *(self._key, self._count, self.resolution, self.num_frames, self.frame_rates),
            *(self.tasks, self.max_objects),
        )
        digest = hashlib.sha256(repr(settings).encode())
        for row in range(min(_PROBES, len(self))):  # another grammar or renderer shows here
            digest.update(self.captioned(row).caption.encode())
            digest.update(self.image(row)[:, :8].contiguous().numpy().data)
        return digest.hexdigest()


def _check_rates(rates: Sequence[float]) -> tuple[float, ...]:
    if not rates or any(not SLOWEST_RATE <= rate <= FASTEST_RATE for rate in rates):
        raise ConfigError(
            f"data.frame_rates=[{', '.join(map(str, rates))}] must name one frame rate or more, "
            f"each {SLOWEST_RATE:g} to {FASTEST_RATE:g} frames a second. Give for example [8]."
        )
    return tuple(float(rate) for rate in rates)


def sprites_module(
    *,
    name: str,
    count: int,
    heldout_count: int,
    resolution: int,
    num_frames: int,
    frame_rates: Sequence[float],
    channels: int,
    num_classes: int,
    tasks: Sequence[SpriteTask],
    max_objects: int,
    sprite_seed: int,
    image_ratio: float,
    flip: bool,
    num_workers: int,
    batch_size: int,
    seed: int,
    limit: int | None = None,
) -> ImageDataModule:
    """Build the data module of ``data=moving_sprites``; the arguments are the keys of its YAML.

    With ``num_frames=0`` it holds still pictures alone, for models and autoencoders of pictures.
    Still pictures are those of the same rows, with captions that name no motion.

    Raises:
        ConfigError: if an argument is out of range.
    """
    from genscale.data.clips import ClipDataModule
    from genscale.data.module import ImageDataModule, check_num_classes

    if channels != 3:
        raise ConfigError(
            f"data.channels={channels} cannot show moving sprites, whose captions name colours. "
            "Set data.channels=3."
        )

    def sprites(split: Literal["train", "heldout"], rows: int, frames: int) -> MovingSprites:
        return MovingSprites(
            rows,
            split=split,
            resolution=resolution,
            num_frames=frames,
            frame_rates=list(frame_rates),
            tasks=list(tasks),
            max_objects=max_objects,
            seed=sprite_seed,
        )

    train = sprites("train", count, num_frames)
    heldout = sprites("heldout", heldout_count, num_frames)
    check_num_classes(train, num_classes)
    if num_frames == 0:
        return ImageDataModule(
            train,
            heldout,
            name=name,
            batch_size=batch_size,
            num_workers=num_workers,
            flip=flip,
            seed=seed,
            limit=limit,
        )
    return ClipDataModule(
        train,
        heldout,
        images=sprites("train", count, 0),
        image_ratio=image_ratio,
        name=name,
        batch_size=batch_size,
        num_workers=num_workers,
        flip=flip,
        seed=seed,
        limit=limit,
    )
