"""The contract of a network that looks at clips, and how a clip is cut to what it reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.metrics.features import FeatureNetwork


def check_clips(clips: Tensor, reader: str = "A metric of clips") -> Tensor:
    """Return ``clips`` after checking that they are 8-bit clips ``(B, 1 or 3, T, H, W)``.

    Args:
        clips: what was given.
        reader: who reads them, for the sentence.

    Raises:
        DataError: for pictures, another type, number of axes or channels.
    """
    if clips.dtype == torch.uint8 and clips.dim() == 5 and clips.shape[1] in (1, 3):
        return clips
    if clips.dtype == torch.uint8 and clips.dim() == 4:
        raise DataError(
            f"{reader} reads uint8 clips of shape (B, 1 or 3, T, H, W), but was given pictures of "
            f"shape {tuple(clips.shape)}. Take metrics of pictures, e.g. metrics=quick."
        )
    raise DataError(
        f"{reader} reads uint8 clips of shape (B, 1 or 3, T, H, W), but got {clips.dtype} of "
        f"shape {tuple(clips.shape)}. Quantise samples first, e.g. with "
        "genscale.io.images.to_uint8."
    )


class ClipNetwork(FeatureNetwork):
    """Maps a clip to one vector; the features of FVD and KVD.

    It reads the first ``frames`` of every ``stride``-th frame.

    Args:
        name: word in metric names.
        frames: frames it reads of a clip, at least 2; None reads all there are.
        stride: one of how many frames is read.

    Raises:
        ConfigError: a number is too small.
    """

    whole_clips = True

    def __init__(self, name: str, frames: int | None, stride: int) -> None:
        super().__init__()
        if (frames is not None and frames < 2) or stride < 1:
            raise ConfigError(
                f"'{name}' needs frames of at least 2 and a stride of at least 1, but frames="
                f"{frames} and stride={stride} were given. Give larger numbers."
            )
        self.name = name
        self.frames = frames
        self.stride = stride

    def check_input(self, images: Tensor) -> Tensor:
        """Return clips after checking that they are long enough.

        Raises:
            DataError: they are none, or too short.
        """
        check_clips(images, f"The feature network '{self.name}'")
        least = (2 if self.frames is None else self.frames) * self.stride
        if images.shape[2] <= least - self.stride:
            every = "," if self.stride == 1 else f", one in {self.stride} of which is read,"
            raise DataError(
                f"The feature network '{self.name}' reads clips of at least "
                f"{least - self.stride + 1} frames{every} but got clips of {images.shape[2]}. "
                "Generate longer clips, or lower its frames or stride."
            )
        return images

    def window(self, clips: Tensor) -> Tensor:
        """Return the frames that are read, in colour: uint8 ``(B, 3, frames, H, W)``."""
        chosen = self.check_input(clips)[:, :, :: self.stride]
        return chosen[:, :, : self.frames].expand(-1, 3, -1, -1, -1)

    def frames_of(self, available: int) -> int:
        """Return how many frames are read of clips of ``available`` frames."""
        return self.frames or -(-available // self.stride)


def flat_frames(clips: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the frames of clips as pictures ``(<= size, C, H, W)``, clip by clip in order."""
    yield from clips.transpose(1, 2).flatten(0, 1).split(size)
