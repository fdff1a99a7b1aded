"""Small videos whose frames are told apart by their grey level."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from torch import Tensor

STEP = 6  # grey levels between two frames; coding is off by one or two


def grey(number: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame ``number``: one grey level, the left half 4 levels brighter."""
    frame = np.full((height, width, 3), number * STEP, np.uint8)
    frame[:, : width // 2] += 4
    return frame


def numbers(frames: Tensor) -> list[int]:
    """Read the numbers of frames ``(T, C, H, W)`` back."""
    return ((frames.float().mean((1, 2, 3)) - 2) / STEP).round().int().tolist()


def write_video(
    path: Path,
    count: int = 20,
    *,
    rate: int = 10,
    times: Sequence[float] | None = None,
    codec: str = "mpeg4",
    size: tuple[int, int] = (32, 48),
) -> Path:
    """Write frames 0, 1, ... at an even rate, or at ``times`` in seconds."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    unit = Fraction(1, 1000) if times is not None else Fraction(1, rate)
    stamps = range(count) if times is None else [round(1000 * time) for time in times]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 2_000_000
        stream.codec_context.time_base = unit
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(grey(number, *size), format="rgb24")
            frame.pts, frame.time_base = stamp, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """Write a file with sound and no pictures."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def damage(path: Path, share: float = 0.5, length: int = 4000) -> Path:
    """Overwrite a part of a video in the middle of its frames with noise; the index stays."""
    content = bytearray(path.read_bytes())
    begin = content.find(b"mdat") + 4
    end = content.find(b"moov") - 4
    start = begin + int((end - begin) * share)
    noise = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8).tobytes()
    stop = min(start + length, end)
    content[start:stop] = noise[: stop - start]
    path.write_bytes(content)
    return path


def lay_on_its_side(path: Path) -> Path:
    """Set the matrix of an mp4's track to a quarter turn clockwise, as cameras do."""
    content = bytearray(path.read_bytes())
    plain = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    place = content.find(plain, content.find(b"tkhd"))
    turned = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    content[place : place + len(plain)] = turned
    path.write_bytes(content)
    return path
