"""Agreement of clips with captions of moving sprites, as one torchmetrics metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from genscale.data.sprites.agreement import ClipReading, Watched, agreement_with
from genscale.data.sprites.grammar import SpriteRequirement, parse_sprites
from genscale.data.sprites.tracker import as_frames, read_frame
from genscale.metrics.captioned import CaptionedMetric, check_captions
from genscale.metrics.protocol import Setting
from genscale.metrics.scene_agreement import as_objects, as_rows
from genscale.metrics.video.clips import check_clips

TRACK_MEASURES = (
    *("track_count", "track_colour", "track_shape", "track_direction", "track_speed"),
    *("track_steady", "track_all"),
)
_MOST_OBJECTS = 12  # of a frame, the largest; a caption names four at most


class TrackingAgreement(CaptionedMetric):
    """How well clips show what their captions say, by the tracker of moving sprites.

    Every measure is the mean over the samples whose caption it applies to:

    - ``track_count``: most frames have as many objects as the caption names.
    - ``track_colour``: share of the named objects found with their colour and shape, one to one.
    - ``track_shape``: share of the named objects found with their shape, one to one.
    - ``track_direction``: share of them found with colour and shape, and moving as named.
    - ``track_speed``: share of them found with colour and shape, and as fast as named.
    - ``track_steady``: nothing appears, vanishes, jumps or changes; whatever the caption.
    - ``track_all``: everything is as the caption says, and steady.

    Args:
        measures: names out of :data:`TRACK_MEASURES`.
        frame_rate: frames a second of the clips; may be set until :meth:`compute`, which tells
            speeds by it.

    Raises:
        ConfigError: if a measure is unknown.
    """

    prefix = "track"
    description = "sprite_tracker_1"

    def __init__(
        self, measures: Sequence[str] = TRACK_MEASURES, *, frame_rate: float = 8.0
    ) -> None:
        super().__init__(measures, TRACK_MEASURES, "moving sprites", {"seen": (4, torch.float64)})
        self.frame_rate = frame_rate

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The frame rate that speeds are told by."""
        return (("frame_rate", self.frame_rate),)

    def update(
        self,
        images: Tensor,
        captions: Sequence[str] | None = None,
        sample_ids: Tensor | None = None,
    ) -> None:
        """Read the objects of every frame and keep them with the captions.

        Args:
            images: uint8 clips ``(B, 3, T, H, H)``, of one length in all calls.
            captions: what each clip was to show; None for samples without captions.
            sample_ids: ``(B,)`` int64 global numbers; on one process they may be left out.

        Raises:
            ConfigError: if a caption does not follow the grammar of moving sprites.
            DataError: if the number of captions is another, or they are no square RGB clips.
        """
        check_clips(images, "The tracker of moving sprites")
        check_captions(captions, len(images))
        shape = (len(images), images.shape[2], _MOST_OBJECTS, 5)
        seen = torch.full(shape, -1.0, dtype=torch.float64)
        for i in range(len(captions or ())):
            frames = [read_frame(frame) for frame in as_frames(images[i])]
            seen[i] = as_rows(frames, _MOST_OBJECTS)
        self._keep(sample_ids, captions, seen)

    def _asked(self, caption: str) -> SpriteRequirement:
        return parse_sprites(caption)

    def _seen(self, row: Tensor) -> ClipReading:
        frames = [as_objects(frame) for frame in row.tolist()]
        return Watched(frames, self.frame_rate).reading()

    def _results(self, seen: ClipReading, asked: SpriteRequirement) -> Mapping[str, float | None]:
        return agreement_with(seen, asked).results()
