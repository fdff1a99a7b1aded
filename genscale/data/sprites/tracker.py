"""From the pixels of a clip back to what moves in it; the caption is not read.

Every frame is read by the oracle of scenes, a border of the opposite side laid around it, so that
what stands across the border is seen whole. Objects of two frames are the same where the sum of
squared distances is least, colour and shape weighing in; farther than the fastest object can
have come, an object is another one. Nothing is learned and nothing is drawn at random.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor

from genscale.data.scenes.grammar import Colour, SceneObject, Shape
from genscale.data.scenes.oracle import read_scene
from genscale.data.sprites.sampling import FASTEST, LARGEST
from genscale.errors import DataError

BEYOND = 2 / 32  # more than half the largest object laid around a frame
SAME_PLACE = 0.5  # of the size: closer than this, two readings are of one object
LEAST_REACH = 3 / 32  # how far an object may come from frame to frame however slow it is
LONGEST_MISS = 1  # frames in a row an object may go unseen and still be the same
OTHER_COLOUR, OTHER_SHAPE = 0.25, 0.02  # added to squared distances
_NEVER = 10.0  # above any sum of squared distance and penalties


@dataclass(slots=True)
class Track:
    """One object through time.

    Attributes:
        frames: numbers of the frames it was seen in, ascending.
        path: its centre in each of them, not folded into the canvas: (x, y) in canvases.
        seen: what was read in each of them.
    """

    frames: list[int] = field(default_factory=list)
    path: list[tuple[float, float]] = field(default_factory=list)
    seen: list[SceneObject] = field(default_factory=list)

    @property
    def colour(self) -> Colour:
        """Its colour in most frames."""
        return Counter(each.colour for each in self.seen).most_common(1)[0][0]

    @property
    def shape(self) -> Shape:
        """Its shape in most frames."""
        return Counter(each.shape for each in self.seen).most_common(1)[0][0]

    @property
    def size(self) -> float:
        """Its middle size, a share of the canvas."""
        return float(np.median([each.size for each in self.seen]))

    @property
    def constant(self) -> bool:
        """Whether it has the same colour throughout."""
        return len({each.colour for each in self.seen}) == 1

    def part(self, first: int, last: int) -> Track:
        """Return what was seen of it in the frames ``first .. last - 1``."""
        rows = [i for i, frame in enumerate(self.frames) if first <= frame < last]
        return Track(
            [self.frames[i] for i in rows],
            [self.path[i] for i in rows],
            [self.seen[i] for i in rows],
        )

    def steps(self) -> NDArray[np.float64]:
        """Return how far it moved a frame: ``(n - 1, 2)`` canvases, to the right and downwards."""
        moved = np.diff(np.array(self.path).reshape(-1, 2), axis=0)
        return moved / np.diff(np.array(self.frames, dtype=np.float64))[:, None]

    def velocity(self, frame_rate: float, resolution: int) -> tuple[float, float]:
        """Return its mean velocity in pixels a second; 0 where it was seen once only.

        Least squares over the whole path: exact for straight motion, noise averaged out.
        """
        if len(self.frames) < 2 or math.isinf(frame_rate):
            return 0.0, 0.0
        times = np.array(self.frames) / frame_rate
        slope = np.polyfit(times - times.mean(), np.array(self.path), 1)[0]
        return float(slope[0]) * resolution, float(slope[1]) * resolution


def as_frames(clip: Tensor) -> NDArray[np.uint8]:
    """Return a clip as uint8 frames ``(T, 3, H, H)``; a picture is a clip of one frame.

    Args:
        clip: ``(3, T, H, H)`` or ``(3, H, H)``, uint8 or floating point in [0, 1], which is
            rounded.

    Raises:
        DataError: if it is no such tensor, or not finite.
    """
    if clip.dim() == 3:
        clip = clip.unsqueeze(1)
    if clip.dim() != 4 or clip.shape[0] != 3 or clip.shape[2] != clip.shape[3]:
        raise DataError(
            "Sprites are tracked in clips of shape (3, T, H, H), but this one has shape "
            f"{tuple(clip.shape)}. Convert it first."
        )
    if clip.is_floating_point():
        if not bool(torch.isfinite(clip).all()):
            raise DataError("The clip has pixels that are NaN or infinite. The model diverged.")
        clip = (clip.detach().float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    frames: NDArray[np.uint8] = clip.cpu().permute(1, 0, 2, 3).contiguous().numpy()
    return frames


def read_frame(frame: NDArray[np.uint8]) -> list[SceneObject]:
    """Return the objects of a frame ``(3, H, H)`` whose borders are joined, largest first."""
    side = frame.shape[1]
    # no more than this of an object whose centre is inside lies beyond a border
    pad = math.ceil((LARGEST[0] / 2 + BEYOND) * side)
    wide = np.pad(frame, ((0, 0), (pad, pad), (pad, pad)), mode="wrap")
    scale = wide.shape[1] / side
    found: list[SceneObject] = []
    for each in read_scene(wide).objects:
        x, y, size = each.x * scale - pad / side, each.y * scale - pad / side, each.size * scale
        edge = 0.5 / side  # a centre on the border is read on both sides
        if not (-edge <= x < 1 + edge and -edge <= y < 1 + edge):
            continue
        own = SceneObject(each.shape, each.colour, x % 1.0, y % 1.0, size)
        if not any(_same(own, other) for other in found):
            found.append(own)
    return found


def _same(one: SceneObject, other: SceneObject) -> bool:
    near = math.hypot(*between(one, other)) < SAME_PLACE * min(one.size, other.size)
    return near and one.colour == other.colour


def between(one: SceneObject, other: SceneObject) -> tuple[float, float]:
    """Return the shortest way from one centre to another, across the borders where it leads."""
    return (other.x - one.x + 0.5) % 1.0 - 0.5, (other.y - one.y + 0.5) % 1.0 - 0.5


def read_tracks(clip: Tensor, frame_rate: float) -> tuple[Track, ...]:
    """Return everything that is seen in a clip, in order of first sight.

    Args:
        clip: ``(3, T, H, H)`` or a picture ``(3, H, H)``, uint8 or floating point in [0, 1].
        frame_rate: frames a second; infinite for still pictures.
    """
    return follow([read_frame(frame) for frame in as_frames(clip)], frame_rate)


def follow(frames: Sequence[Sequence[SceneObject]], frame_rate: float) -> tuple[Track, ...]:
    """Return the tracks of what was read in each frame; see :func:`read_tracks`."""
    # half a canvas is the farthest that there is
    reach = max(LEAST_REACH, FASTEST / frame_rate * 1.2)
    tracks: list[Track] = []
    for number, objects in enumerate(frames):
        open_ = [each for each in tracks if number - each.frames[-1] <= 1 + LONGEST_MISS]
        costs = np.array([[_cost(each, o, number, reach) for o in objects] for each in open_])
        costs = costs.reshape(len(open_), len(objects))
        rows, columns = optimize.linear_sum_assignment(np.minimum(costs, _NEVER))
        taken = set()
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            if costs[row, column] < _NEVER:
                _extend(open_[row], objects[column], number)
                taken.add(column)
        for column, each in enumerate(objects):
            if column not in taken:
                tracks.append(Track([number], [(each.x, each.y)], [each]))
    return tuple(tracks)


def _cost(track: Track, each: SceneObject, number: int, reach: float) -> float:
    """Return how unlikely an object is the one of a track; infinite where it cannot be."""
    frames = number - track.frames[-1]
    right, down = between(track.seen[-1], each)
    if math.hypot(right, down) > reach * frames:
        return math.inf
    if len(track.frames) > 1:  # it goes on as it went
        before, last = track.path[-2:]
        passed = frames / (track.frames[-1] - track.frames[-2])
        right -= (last[0] - before[0]) * passed
        down -= (last[1] - before[1]) * passed
    penalty = OTHER_SHAPE * (each.shape != track.seen[-1].shape)
    penalty += OTHER_COLOUR * (each.colour != track.seen[-1].colour)
    return right**2 + down**2 + penalty


def _extend(track: Track, each: SceneObject, number: int) -> None:
    right, down = between(track.seen[-1], each)
    x, y = track.path[-1]
    track.frames.append(number)
    track.path.append((x + right, y + down))
    track.seen.append(each)
