"""What must be known of the clips behind a number, beside what every evaluation protocol says."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from genscale.errors import ProtocolError, did_you_mean

_REAL_CLIPS = ("fixed", "random_offset", "sliding", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipProtocol:
    """Everything about clips that moves a metric by points; part of the protocol's hash.

    Attributes:
        frames: frames that a metric reads of a clip.
        stride: one of how many frames of the video is read.
        frame_rate: frames a second of the video; 0 where unknown.
        size: ``HxW`` of the frames before the metric resizes them: 64 -> 224 and 128 -> 224
            pixels give different FVDs.
        real_clips: which clip of a real video is taken: ``fixed`` (the data set's own choice),
            ``random_offset`` (one a video, videos too short dropped), ``sliding`` or ``all``.
        codec: how frames were stored; ``frames`` without loss, else e.g. ``h264_crf18``. Real and
            generated clips have to come from the same.

    Raises:
        ProtocolError: an unknown ``real_clips``, or no positive number of frames.
    """

    frames: int
    stride: int = 1
    frame_rate: float = 0.0
    size: str = ""
    real_clips: str = "fixed"
    codec: str = "frames"

    def __post_init__(self) -> None:
        if self.real_clips not in _REAL_CLIPS:
            raise ProtocolError(
                f"protocol.clips.real_clips='{self.real_clips}' is unknown. "
                f"Choose one of {', '.join(_REAL_CLIPS)}."
                f"{did_you_mean(self.real_clips, _REAL_CLIPS)}"
            )
        if self.frames < 1 or self.stride < 1:
            raise ProtocolError(
                "protocol.clips needs at least one frame and a stride of at least 1, but "
                f"frames={self.frames} and stride={self.stride} were given. Give positive numbers."
            )
        object.__setattr__(self, "frame_rate", float(self.frame_rate))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClipProtocol:
        """Rebuild it from what :meth:`EvalProtocol.to_dict` stores.

        Raises:
            ProtocolError: if a field is unknown.
        """
        known = [each.name for each in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ProtocolError(
                f"'{unknown[0]}' is no field of a protocol of clips. Known are {', '.join(known)}."
            )
        return cls(**values)
