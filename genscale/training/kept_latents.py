"""Latents of a data set's pictures and of their small versions, encoded once and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genscale.data.base import ImageDataset
from genscale.data.stream import GlobalStream
from genscale.io.images import from_uint8
from genscale.training.trainable import PictureBatch

_BATCH = 64  # always as many at once, so that an interrupted run keeps the same bits


class KeptLatents:
    """What a latent upscaler learns from, by the place of a picture in the global stream.

    Pictures are encoded when the first batch is asked for, on its device.

    Args:
        pictures: of training, neither cut nor mirrored.
        seed: of the stream.
        encode: makes latents of pictures in [-1, 1].
        reduce: makes pictures small by a factor.
        scales: the factors.
    """

    def __init__(
        self,
        pictures: ImageDataset,
        *,
        seed: int,
        encode: Callable[[Tensor], Tensor],
        reduce: Callable[[Tensor, int], Tensor],
        scales: Sequence[int],
    ) -> None:
        self.pictures = pictures
        self.stream = GlobalStream(len(pictures), seed)
        self.encode, self.reduce, self.scales = encode, reduce, tuple(scales)
        self._kept: dict[int, Tensor] = {}

    def of(self, batch: PictureBatch, scale: int) -> Tensor:
        """Return the latents of a batch's pictures made small by ``scale``; 1 leaves them large."""
        if not self._kept:
            self._encode(batch.images.device)
        start = batch.step * batch.size
        rows = self.stream.rows(start, batch.size).to(batch.position.device)
        chosen = rows[batch.position - start].to(self._kept[scale].device)
        return self._kept[scale][chosen]

    @torch.no_grad()
    def _encode(self, device: torch.device) -> None:
        parts: dict[int, list[Tensor]] = {scale: [] for scale in (1, *self.scales)}
        for rows in torch.split(torch.arange(len(self.pictures)), _BATCH):
            images = from_uint8(self.pictures.images(rows)).to(device)
            for scale, kept in parts.items():
                kept.append(self.encode(images if scale == 1 else self.reduce(images, scale)))
        self._kept = {scale: torch.cat(kept) for scale, kept in parts.items()}
