"""The tracker reads clips back without their captions, and sees what is wrong with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from genscale.data.scenes.grammar import SceneObject
from genscale.data.sprites.agreement import (
    FACTS,
    ClipAgreement,
    ClipReading,
    Mover,
    TrackScore,
    Watched,
    agreement_with,
    clip_agreement,
    speed_of,
    track_score,
    watch,
)
from genscale.data.sprites.dataset import MovingSprites
from genscale.data.sprites.grammar import Sprite, SpriteScene, parse_sprites
from genscale.data.sprites.renderer import positions, render_clip
from genscale.data.sprites.tracker import Track, as_frames, between, follow, read_frame, read_tracks
from genscale.errors import ConfigError, DataError

RATE = 8.0


def moving(right: float, down: float, *, x: float = 0.3, bounces: bool = False) -> Sprite:
    return Sprite("circle", "red", 0.3, x, 0.4, (right, down), bounces)


def filmed(*sprites: Sprite, frames: int = 8) -> Tensor:
    scene = SpriteScene("navy", sprites, math.inf)
    return torch.from_numpy(render_clip(scene, np.arange(frames) / RATE, 32))


def away(one: float, other: float) -> float:
    return abs((one - other + 0.5) % 1.0 - 0.5)


def matches(track: Track, sprite: Sprite, rate: float, frames: int) -> bool:
    """Whether a track has the shape, colour and, within 0.6 pixels, places of an object."""
    x, y = positions(sprite, np.arange(frames) / rate)
    off = max(
        max(away(a, x[t]), away(b, y[t]))
        for t, (a, b) in zip(track.frames, track.path, strict=True)
    )
    return (track.shape, track.colour) == (sprite.shape, sprite.colour) and off < 0.6 / 32


class TestTracking:
    @pytest.mark.parametrize(
        ("count", "settings"),
        [
            (60, {}),
            pytest.param(200, {"max_objects": 4}, marks=pytest.mark.slow),
            (40, {"max_objects": 4, "frame_rates": [4, 8, 30], "num_frames": 6}),
            (6, {"num_frames": 40}),
            (16, {"resolution": 64}),
        ],
    )
    def test_every_clip_is_read_back_exactly(self, count: int, settings: dict) -> None:
        data = MovingSprites(count, seed=1, **settings)
        side = data.resolution
        rates = data.frame_rate(range(count)).tolist()
        for row, (clip, rate) in enumerate(zip(data.images(range(count)), rates, strict=True)):
            tracks, sprites = read_tracks(clip, rate), data.captioned(row).scene.sprites
            assert len(tracks) == len(sprites)
            for sprite in sprites:
                (own,) = (t for t in tracks if matches(t, sprite, rate, data.num_frames))
                assert own.frames == list(range(data.num_frames))  # seen throughout
                assert own.constant
                assert own.size == pytest.approx(sprite.size, abs=0.6 / side)
                if not sprite.bounces:  # in pixels a second
                    expected = [each * side for each in sprite.velocity]
                    assert own.velocity(rate, side) == pytest.approx(expected, abs=1.0)

    def test_mild_noise_changes_no_fact(self) -> None:
        data = MovingSprites(50, seed=2)
        noise = torch.Generator().manual_seed(0)
        steady = 0.0
        for row, clip in enumerate(data.images(range(50)).float() / 255):
            noisy = clip + 0.05 * torch.randn(clip.shape, generator=noise)
            found = clip_agreement(noisy, data.captions[row], RATE)
            assert found.mean == 1.0
            steady += found.steady
        assert steady >= 48

    def test_an_object_across_the_border_is_one_object(self) -> None:
        frame = filmed(moving(0, 0, x=0.99))[:, 0].numpy()
        (found,) = read_frame(frame)
        assert (found.shape, found.colour) == ("circle", "red")
        assert away(found.x, 0.99) < 0.02
        assert between(found, SceneObject("ring", "red", 0.1, found.y, 0.3)) == pytest.approx(
            (0.11, 0.0), abs=0.02
        )

    def test_paths_go_on_across_the_border(self) -> None:
        (track,) = read_tracks(filmed(moving(1.0, 0.0, x=0.8)), RATE)
        assert track.path[-1][0] - track.path[0][0] == pytest.approx(7 / 8, abs=0.02)
        assert track.part(2, 5).frames == [2, 3, 4]
        assert track.steps().shape == (7, 2)
        assert track.velocity(math.inf, 32) == (0.0, 0.0)

    def test_the_same_kinds_side_by_side_keep_their_identity(self) -> None:
        def at(x: float) -> SceneObject:
            return SceneObject("circle", "red", x % 1.0, 0.5, 0.25)

        frames = [[at(0.1 + 0.1 * t), at(0.45 + 0.1 * t)] for t in range(8)]
        frames = [objects[:: 1 if t % 2 else -1] for t, objects in enumerate(frames)]
        tracks = follow(frames, RATE)
        assert [len(track.frames) for track in tracks] == [8, 8]
        for track in tracks:
            assert track.steps()[:, 0] == pytest.approx([0.1] * 7)

    def test_an_object_missed_once_is_the_same_and_missed_twice_another(self) -> None:
        seen = [[SceneObject("circle", "red", 0.1 + 0.05 * t, 0.5, 0.3)] for t in range(8)]
        once = [*seen[:3], [], *seen[4:]]
        twice = [*seen[:3], [], [], *seen[5:]]
        assert [track.frames for track in follow(once, RATE)] == [[0, 1, 2, 4, 5, 6, 7]]
        assert len(follow(twice, RATE)) == 2

    def test_values_in_0_to_1_and_8_bits_are_alike(self) -> None:
        clip = filmed(moving(0.5, 0.0))
        assert np.array_equal(as_frames(clip.float() / 255), as_frames(clip))
        assert as_frames(clip[:, 0]).shape == (1, 3, 32, 32)

    @pytest.mark.parametrize(
        ("clip", "sentence"),
        [
            (torch.zeros(1, 8, 32, 32), r"of shape \(3, T, H, H\)"),
            (torch.zeros(3, 8, 32, 16), r"of shape \(3, T, H, H\)"),
            (torch.full((3, 2, 32, 32), torch.nan), r"NaN or infinite"),
        ],
    )
    def test_other_layouts_are_refused(self, clip: Tensor, sentence: str) -> None:
        with pytest.raises(DataError, match=sentence):
            read_tracks(clip, RATE)


class TestAgreement:
    @pytest.mark.parametrize(
        ("sprite", "caption", "expected"),
        [
            # count, colour, shape, direction, speed
            (moving(0.5, 0), "a red circle moving right", (1, 1, 1, 1, None)),
            (moving(0.5, 0), "a red circle moving left", (1, 1, 1, 0, None)),
            (moving(0.5, 0), "a still red circle", (1, 1, 1, 0, None)),
            (moving(0, 0), "a still red circle", (1, 1, 1, 1, None)),
            (moving(0, 0), "a red circle moving up", (1, 1, 1, 0, None)),
            (moving(0, -0.5), "a red circle moving up", (1, 1, 1, 1, None)),
            (moving(0, 0.25), "a red circle moving slowly down", (1, 1, 1, 1, 1)),
            (moving(0, 0.5), "a red circle moving slowly down", (1, 1, 1, 1, 0)),
            (moving(0, 1.0), "a red circle moving quickly down", (1, 1, 1, 1, 1)),
            (moving(0.35, 0.35), "a red circle moving right", (1, 1, 1, 0, None)),
            (moving(0.35, 0.35, bounces=True), "a red circle bouncing", (1, 1, 1, 1, None)),
            (moving(0.35, 0.35, x=0.7), "a red circle bouncing", (1, 1, 1, 0, None)),  # it leaves
            (moving(0.5, 0), "a blue circle moving right", (1, 0, 1, 0, None)),
            (moving(0.5, 0), "a red square moving right", (1, 0, 0, 0, None)),
            (moving(0.5, 0), "two red circles moving right", (0, 0.5, 0.5, 0.5, None)),
            (moving(0.5, 0), "a red circle", (1, 1, 1, None, None)),
        ],
    )
    def test_what_a_clip_has_of_a_caption(
        self, sprite: Sprite, caption: str, expected: tuple
    ) -> None:
        found = clip_agreement(filmed(sprite), caption, RATE)
        assert tuple(found.facts().values()) == expected
        assert tuple(found.facts()) == FACTS
        asked = [each for each in expected if each is not None]
        assert found.mean == pytest.approx(sum(asked) / len(asked))
        assert found.all == float(all(each == 1 for each in asked))
        assert found.results()["steady"] == 1.0

    def test_a_pair_is_matched_object_by_object(self) -> None:
        square = Sprite("square", "green", 0.25, 0.7, 0.8, (-0.5, 0.0))
        clip = filmed(moving(0.5, 0), square)
        caption = "a red circle moving right and a green square moving {}"
        assert clip_agreement(clip, caption.format("left"), RATE).all == 1.0
        assert clip_agreement(clip, caption.format("up"), RATE).direction == 0.5

    def test_pictures_tell_no_motion(self) -> None:
        frame = filmed(moving(0.5, 0))[:, 0]
        for clip, rate in ((frame, RATE), (frame.unsqueeze(1).repeat(1, 8, 1, 1), math.inf)):
            seen = watch(clip, rate).reading()
            assert isinstance(seen, ClipReading)
            assert not seen.timed
            found = agreement_with(seen, parse_sprites("a red circle moving quickly up"))
            assert isinstance(found, ClipAgreement)
            assert (found.direction, found.speed, found.all) == (None, None, 1.0)

    def test_readings_say_what_moves_how(self) -> None:
        (mover,) = watch(filmed(moving(0.0, 1.0)), RATE).reading().movers
        assert isinstance(mover, Mover)
        assert (mover.shape, mover.colour, mover.motion) == ("circle", "red", "down")
        assert mover.speed == pytest.approx(1.0, abs=0.03)
        assert [speed_of(rate) for rate in (0.25, 0.5, 1.0)] == ["slowly", None, "quickly"]

    def test_speeds_follow_the_frame_rate(self) -> None:
        clip = filmed(moving(0.0, 0.5))
        caption = "a red circle moving {} down"
        assert clip_agreement(clip, caption.format("slowly"), RATE / 2).speed == 1.0
        assert clip_agreement(clip, caption.format("quickly"), RATE * 2).speed == 1.0

    def test_nothing_on_an_empty_clip(self) -> None:
        found = clip_agreement(torch.zeros(3, 8, 32, 32), "a still red circle", RATE)
        assert list(found.facts().values()) == [0.0, 0.0, 0.0, 0.0, None]


class TestSteadiness:
    def test_flaws_are_seen(self) -> None:
        whole = filmed(moving(0.5, 0.0), frames=8)
        assert watch(whole, RATE).reading().steady

        jumps = torch.cat([whole[:, :4], whole[:, 4:].roll(10, -2)], 1)
        recoloured = whole.clone()
        recoloured[0, 4:], recoloured[1, 4:] = whole[1, 4:], whole[0, 4:]
        vanishes = whole.clone()
        vanishes[:, 5:] = whole[:, :1, :1, :1]
        stops = torch.cat([whole[:, :4], whole[:, 3:4].repeat(1, 4, 1, 1)], 1)
        doubled = torch.maximum(whole, whole.roll(16, -2))
        appears = torch.cat([whole[:, :5], doubled[:, 5:]], 1)
        for clip in (jumps, recoloured, vanishes, stops, appears):
            assert not watch(clip, RATE).reading().steady

    def test_reading_parts_of_a_clip(self) -> None:
        whole = filmed(moving(0.5, 0.0), frames=16)
        watched = watch(torch.cat([whole[:, :8], whole.roll(12, -2)[:, 8:]], 1), RATE)
        assert isinstance(watched, Watched)
        assert watched.reading(0, 8).steady
        assert watched.reading(8, 16).steady
        assert not watched.reading(6, 10).steady


class TestWindows:
    def test_long_clips_hold_in_every_window(self) -> None:
        data = MovingSprites(2, seed=4, num_frames=160, tasks=["pair", "count", "speed"])
        for row in range(2):
            score = track_score(data.image(row), data.captions[row], 8, stride=4)
            assert isinstance(score, TrackScore)
            assert score.starts == tuple(range(0, 153, 4))
            assert set(score.series("all")) == {1.0}

    def test_bouncing_holds_in_every_window(self) -> None:
        clip = filmed(moving(0.4, 0.3, bounces=True), frames=60)
        assert set(track_score(clip, "a red circle bouncing", 6).series("all")) == {1.0}

    def test_a_flaw_between_two_blocks_shows_in_the_windows_across_alone(self) -> None:
        whole = filmed(moving(0.5, 0.0), frames=24)
        clip = torch.cat([whole[:, :12], whole.roll(12, -2)[:, 12:]], 1)
        score = track_score(clip, "a red circle moving right", 4)
        broken = [s for s, all_ in zip(score.starts, score.series("all"), strict=True) if all_ < 1]
        assert broken == [9, 10, 11]

    def test_what_is_forgotten_late_shows_late(self) -> None:
        whole = filmed(moving(0.5, 0.0), frames=24)
        frozen = torch.cat([whole[:, :12], whole[:, 11:12].repeat(1, 12, 1, 1)], 1)
        direction = track_score(frozen, "a red circle moving right", 4).series("direction")
        assert direction[:9] == (1.0,) * 9
        assert direction[11:] == (0.0,) * 10
        speed = track_score(frozen, "a red circle moving right", 4).series("speed")
        assert all(math.isnan(each) for each in speed)  # nobody asked

    def test_windows_that_do_not_fit_are_refused(self) -> None:
        clip = filmed(moving(0.5, 0.0))
        for window, stride in ((1, 1), (9, 1), (4, 0)):
            with pytest.raises(ConfigError, match=rf"window={window} and stride={stride} do not"):
                track_score(clip, "a red circle", window, stride=stride)
        with pytest.raises(ConfigError, match=r"a clip of 1 frames"):
            track_score(clip[:, 0], "a red circle", 2)
