"""Picture networks on clips: every frame, or every change from frame to frame, is a picture."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.metrics.features import FeatureNetwork
from genscale.metrics.parts import PartFeatures
from genscale.metrics.video.clips import check_clips, flat_frames


class FrameFeatures(PartFeatures):
    """Features of the frames of clips by a network of pictures: a set of vectors a clip.

    ``fd_frames`` then is the FID of frames: it sees what single frames look like, and nothing of
    time. With ``of="differences"`` it looks at the changes between neighbouring frames, halved
    and shifted to middle grey: a cheap witness of motion.

    Args:
        network: a network of pictures.
        of: what is looked at.
        frames: how many frames of a clip, evenly spaced (1: the middle one); None: all.
        frames_a_pass: pictures the network sees at once.
        name: word in metric names; None: ``frames`` or ``frame_differences``.

    Raises:
        ConfigError: the network reads clips itself, or a number is below 1.
    """

    per_frame = True

    def __init__(
        self,
        network: FeatureNetwork,
        *,
        of: Literal["frames", "differences"] = "frames",
        frames: int | None = None,
        frames_a_pass: int = 256,
        name: str | None = None,
    ) -> None:
        if network.whole_clips or network.per_frame:
            raise ConfigError(
                f"FrameFeatures needs a network of pictures, but '{network.name}' reads clips. "
                "Use it as it is."
            )
        if of not in ("frames", "differences"):
            raise ConfigError(f"of='{of}' is unknown. Choose one of frames, differences.")
        if frames_a_pass < 1 or (frames is not None and frames < 1):
            raise ConfigError(
                "FrameFeatures needs positive numbers, but frames="
                f"{frames} and frames_a_pass={frames_a_pass} were given."
            )
        super().__init__(network, name or ("frames" if of == "frames" else "frame_differences"))
        self.of = of
        self.frames = frames
        self.frames_a_pass = frames_a_pass

    @property
    def description(self) -> str:
        """The network's name in protocols, with what of a clip it looks at."""
        which = "every" if self.frames is None else str(self.frames)
        return f"{self.network.description} of {which} {self.of}"

    def check_input(self, images: Tensor) -> Tensor:
        """Return clips after checking them.

        Raises:
            DataError: they are none, or have a single frame where changes are looked at.
        """
        check_clips(images, f"The feature network '{self.name}'")
        if self.of == "differences" and images.shape[2] < 2:
            raise DataError(
                f"'{self.name}' looks at changes between frames, but the clips have one frame. "
                "Give clips of two frames or more."
            )
        return images

    def fit(self, images: Tensor, labels: Tensor | None, fingerprint: str) -> None:
        """Let the network learn from what it looks at of real clips, each labelled as its clip."""
        pictures = self.pictures(images)
        repeated = None if labels is None else labels.repeat_interleave(pictures.shape[2])
        flat = pictures.transpose(1, 2).flatten(0, 1)
        self.network.fit(flat, repeated, f"{fingerprint} {self.description}")

    def pictures(self, clips: Tensor) -> Tensor:
        """Return what is looked at: uint8 ``(B, C, frames, H, W)``."""
        clips = self.check_input(clips)
        if self.of == "differences":
            before, after = clips[:, :, :-1].to(torch.int16), clips[:, :, 1:].to(torch.int16)
            clips = ((after - before + 256) // 2).to(torch.uint8)  # 128: nothing changed
        if self.frames is None or self.frames >= clips.shape[2]:
            return clips
        # centres of as many equal parts of the clip
        places = (2 * torch.arange(self.frames) + 1) * clips.shape[2] // (2 * self.frames)
        return clips[:, :, places.to(clips.device)]

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return every tap ``(B, frames, length)`` of clips ``(B, 1 or 3, T, H, W)``."""
        pictures = self.pictures(images)
        found: dict[str, list[Tensor]] = {}
        for part in flat_frames(pictures, self.frames_a_pass):
            for tap, value in self.network(part).items():
                found.setdefault(tap, []).append(value)
        self.taps = self.network.taps  # pixels learn their number from pictures
        return {
            tap: torch.cat(values).unflatten(0, (len(images), pictures.shape[2]))
            for tap, values in found.items()
        }
