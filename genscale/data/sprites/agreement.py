"""Whether a clip shows what its caption says, as a whole or a few frames at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize
from torch import Tensor

from genscale.data.scenes.grammar import Colour, SceneObject, Shape
from genscale.data.sprites.grammar import (
    Motion,
    Speed,
    SpriteGroup,
    SpriteRequirement,
    parse_sprites,
)
from genscale.data.sprites.sampling import OBLIQUE, USUAL
from genscale.data.sprites.tracker import Track, as_frames, follow, read_frame
from genscale.errors import ConfigError

STILL_BELOW = USUAL / 4  # canvases a second: half of "slowly"
STRAIGHT = 0.3  # motion across a direction, of that along it, at most
SLOW_BELOW = USUAL / math.sqrt(2)  # halfway between two speeds, in factors
QUICK_ABOVE = USUAL * math.sqrt(2)
LASTING = 0.5  # share of the frames in which an object must be seen to count as one
ODD_FRAMES = 1 / 8  # share of frames with another number of objects that is put down to reading
JUMP = 1.5 / 32  # canvases: a step may be so much off the usual one,
JUMP_SHARE = 0.5  # or so much of it

MOTIONS: tuple[Motion | None, ...] = ("left", "right", "up", "down", "still", "bouncing", None)
FACTS = ("count", "colour", "shape", "direction", "speed")


@dataclass(frozen=True, slots=True)
class Mover:
    """An object of a clip, and how it moves.

    Attributes:
        shape: its shape.
        colour: its colour.
        motion: None where it fits no word, or cannot be told from one frame.
        speed: canvases a second; nan where it cannot be told.
    """

    shape: Shape
    colour: Colour
    motion: Motion | None
    speed: float


@dataclass(frozen=True, slots=True)
class ClipReading:
    """What is seen in a clip, or in some of its frames.

    Attributes:
        count: objects in most frames.
        steady: nothing appears or vanishes, jumps, changes its colour or its speed.
        movers: objects that are seen in half of the frames at least.
        timed: it has several frames, and time between them.
    """

    count: int
    steady: bool
    movers: tuple[Mover, ...]
    timed: bool


@dataclass(frozen=True, slots=True)
class ClipAgreement:
    """How well a clip shows what a caption says; None where the caption asks for no such thing.

    Attributes:
        count: 1 if most frames have as many objects as the caption names, else 0.
        colour: share of the caption's objects that find one of their colour and shape, one to
            one.
        shape: share of them that find one of their shape.
        direction: share of them that find one of their colour and shape that moves so, stands
            still, or bounces.
        speed: share of them that find one of their colour, shape and speed.
        steady: 1 if nothing appears, vanishes, jumps or changes, else 0: no caption asks for it.
    """

    count: float
    colour: float
    shape: float
    direction: float | None
    speed: float | None
    steady: float

    def facts(self) -> dict[str, float | None]:
        """Return what the caption asks for by name."""
        return {name: getattr(self, name) for name in FACTS}

    @property
    def mean(self) -> float:
        """Mean of the facts that the caption asks for."""
        asked = [each for each in self.facts().values() if each is not None]
        return sum(asked) / len(asked)

    @property
    def all(self) -> float:
        """1 if everything is as the caption says, and steady, else 0."""
        return float(all(each in (None, 1.0) for each in (*self.facts().values(), self.steady)))

    def results(self) -> dict[str, float | None]:
        """Return every result by name, ``steady`` and ``all`` last."""
        return {**self.facts(), "steady": self.steady, "all": self.all}


class Watched:
    """A clip that was read once, to be asked about all of it or about parts.

    Args:
        frames: what was read in each frame.
        frame_rate: frames a second; infinite for still pictures.
    """

    def __init__(self, frames: Sequence[Sequence[SceneObject]], frame_rate: float) -> None:
        self.frame_rate = frame_rate
        self.counts = [len(each) for each in frames]
        self.tracks = follow(frames, frame_rate)

    def reading(self, first: int = 0, last: int | None = None) -> ClipReading:
        """Return what is seen in the frames ``first .. last - 1``, by default in all."""
        last = len(self.counts) if last is None else last
        frames = last - first
        counts = self.counts[first:last]
        count = Counter(counts).most_common(1)[0][0]
        parts = [part for each in self.tracks if (part := each.part(first, last)).frames]
        timed = frames > 1 and math.isfinite(self.frame_rate)
        lasting = [each for each in parts if len(each.frames) >= LASTING * frames]
        odd = sum(each != count for each in counts)
        # a track that ends and another that begins are a jump, or an object that changed
        steady = (
            odd <= ODD_FRAMES * frames
            and len(lasting) == count
            and all(each.constant and not _jumps(each) for each in lasting)
            and all(
                each.frames[0] - first <= ODD_FRAMES * frames
                and last - 1 - each.frames[-1] <= ODD_FRAMES * frames
                for each in lasting
            )
        )
        movers = tuple(_as_mover(each, self.frame_rate if timed else None) for each in lasting)
        return ClipReading(count, steady, movers, timed)


def watch(clip: Tensor, frame_rate: float) -> Watched:
    """Read a clip.

    Args:
        clip: ``(3, T, H, H)`` or a picture ``(3, H, H)``, uint8 or floating point in [0, 1].
        frame_rate: frames a second; infinite for still pictures.

    Raises:
        DataError: if the clip has another layout.
    """
    return Watched([read_frame(frame) for frame in as_frames(clip)], frame_rate)


def _paces(track: Track) -> tuple[float, float]:
    """Return the usual way of a track along each axis a frame, whichever way it goes."""
    right, down = np.median(np.abs(track.steps()), axis=0)
    return float(right), float(down)


def _jumps(track: Track) -> bool:
    """Return whether a step is no part of steady motion, or of turning back at a border."""
    steps = track.steps()
    if not len(steps):
        return False
    paces = np.array(_paces(track))
    usual = np.sign(np.median(steps, axis=0)) * paces
    allowed = np.maximum(JUMP, JUMP_SHARE * np.hypot(*paces))
    if bool((np.abs(steps - usual) <= allowed).all()):
        return False
    # turning back shortens a step or reverses it; it never makes one longer
    return bool((np.abs(steps) > paces + allowed).any()) or not _turns_at_borders(track)


def _turns_at_borders(track: Track) -> bool:
    """Return whether a track stays inside the canvas and reverses only beside a border."""
    path, steps = np.array(track.path), track.steps()
    half = track.size / 2
    slack = np.array(_paces(track)) + JUMP
    if bool((path < half - JUMP).any()) or bool((path > 1 - half + JUMP).any()):
        return False
    for axis in (0, 1):
        turned = np.nonzero(steps[1:, axis] * steps[:-1, axis] < -((JUMP / 4) ** 2))[0] + 1
        beside = np.minimum(path[turned, axis] - half, 1 - half - path[turned, axis])
        if bool((beside > slack[axis] + JUMP).any()):
            return False
    return True


def _as_mover(track: Track, frame_rate: float | None) -> Mover:
    if frame_rate is None or len(track.frames) < 2:
        return Mover(track.shape, track.colour, None, math.nan)
    right, down = track.velocity(frame_rate, 1)
    paces = [each * frame_rate for each in _paces(track)]
    motion: Motion | None = None
    speed = math.hypot(right, down)
    if math.hypot(*paces) < STILL_BELOW:
        motion = "still"
    elif min(paces) >= OBLIQUE * 0.7 * max(paces):
        speed = math.hypot(*paces)
        motion = "bouncing" if _turns_at_borders(track) else None
    elif abs(down) <= STRAIGHT * abs(right) and paces[1] <= STRAIGHT * paces[0]:
        motion = "right" if right > 0 else "left"
    elif abs(right) <= STRAIGHT * abs(down) and paces[0] <= STRAIGHT * paces[1]:
        motion = "down" if down > 0 else "up"
    return Mover(track.shape, track.colour, motion, speed)


def speed_of(rate: float) -> Speed | None:
    """Return the word for a speed in canvases a second; None for the usual one."""
    if rate < SLOW_BELOW:
        return "slowly"
    return "quickly" if rate > QUICK_ABOVE else None


def agreement_with(seen: ClipReading, asked: SpriteRequirement) -> ClipAgreement:
    """Return how well what is seen meets a requirement; see :class:`ClipAgreement`.

    Directions and speeds of a clip without time are not told: None even where they are asked for.
    """

    def shape(wanted: SpriteGroup, each: Mover) -> bool:
        return wanted.kind.shape == each.shape

    def kind(wanted: SpriteGroup, each: Mover) -> bool:
        return shape(wanted, each) and wanted.kind.colour in (None, each.colour)

    def direction(wanted: SpriteGroup, each: Mover) -> bool:
        return kind(wanted, each) and wanted.motion in (None, each.motion)

    def speed(wanted: SpriteGroup, each: Mover) -> bool:
        return kind(wanted, each) and wanted.speed in (None, speed_of(each.speed))

    moves = seen.timed and any(group.motion is not None for group in asked.groups)
    paced = seen.timed and any(group.speed is not None for group in asked.groups)
    return ClipAgreement(
        count=float(seen.count == asked.count),
        colour=_matched(asked.objects, seen.movers, kind),
        shape=_matched(asked.objects, seen.movers, shape),
        direction=_matched(asked.objects, seen.movers, direction) if moves else None,
        speed=_matched(asked.objects, seen.movers, speed) if paced else None,
        steady=float(seen.steady),
    )


def _matched(
    wanted: Sequence[SpriteGroup],
    movers: Sequence[Mover],
    fits: Callable[[SpriteGroup, Mover], bool],
) -> float:
    """Return the largest share of what is wanted that can be given objects one to one."""
    table = np.array([[fits(each, mover) for mover in movers] for each in wanted], dtype=float)
    table = table.reshape(len(wanted), len(movers))
    return float(table[optimize.linear_sum_assignment(table, maximize=True)].sum()) / len(wanted)


def clip_agreement(clip: Tensor, caption: str, frame_rate: float) -> ClipAgreement:
    """Return how well a clip shows what a caption says.

    Args:
        clip: ``(3, T, H, H)`` or a picture ``(3, H, H)``, uint8 or floating point in [0, 1].
        caption: a caption of the grammar of moving sprites.
        frame_rate: frames a second; infinite for still pictures.

    Raises:
        ConfigError: if the caption does not follow the grammar.
        DataError: if the clip has another layout.
    """
    return agreement_with(watch(clip, frame_rate).reading(), parse_sprites(caption))


@dataclass(frozen=True, slots=True)
class TrackScore:
    """How well a long clip shows what its caption says as time goes on.

    Attributes:
        starts: first frame of each window.
        windows: the agreement of each.
    """

    starts: tuple[int, ...]
    windows: tuple[ClipAgreement, ...]

    def series(self, name: str) -> tuple[float, ...]:
        """Return a result over time: ``count`` .. ``all``, or ``mean``; nan where not asked."""
        values = (getattr(each, name) for each in self.windows)
        return tuple(math.nan if value is None else value for value in values)


def track_score(
    clip: Tensor, caption: str, window: int, *, frame_rate: float = 8.0, stride: int = 1
) -> TrackScore:
    """Judge a long clip a few frames at a time: inside blocks, across their borders, late.

    A window that begins at frame s covers s .. s + window - 1; what happens between two blocks
    shows in the windows that hold frames of both. The clip is tracked once, as a whole.

    Args:
        clip: ``(3, T, H, H)``, uint8 or floating point in [0, 1].
        caption: a caption of the grammar of moving sprites.
        window: frames of a window, 2 or more; at most T.
        frame_rate: frames a second.
        stride: frames from a window to the next.

    Raises:
        ConfigError: a caption outside the grammar, or a window that does not fit.
    """
    frames = clip.shape[1] if clip.dim() == 4 else 1
    if not 2 <= window <= frames or stride < 1:
        raise ConfigError(
            f"window={window} and stride={stride} do not fit a clip of {frames} frames. Give a "
            "window of 2 frames or more that lies in the clip, and a stride of 1 or more."
        )
    asked = parse_sprites(caption)
    watched = watch(clip, frame_rate)
    starts = tuple(range(0, frames - window + 1, stride))
    return TrackScore(
        starts,
        tuple(agreement_with(watched.reading(s, s + window), asked) for s in starts),
    )
