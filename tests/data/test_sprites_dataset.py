"""Moving sprites as a data set: rows that stay, exact drawing, captions that fit the motion."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from genscale import rng
from genscale.cli.building import instantiate
from genscale.data.captioned import WrittenCaptions
from genscale.data.scenes.grammar import Scene, SceneObject
from genscale.data.scenes.renderer import render
from genscale.data.sprites.dataset import MovingSprites, sprites_module
from genscale.data.sprites.grammar import SPRITE_TASKS, Sprite, SpriteScene, parse_sprites
from genscale.data.sprites.renderer import EDGE, positions, render_clip
from genscale.data.sprites.sampling import GAP, CaptionedClip, clip_at
from genscale.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"
STEP = 1 / 240


def clip_of(*sprites: Sprite, times: tuple[float, ...] = (0.0,), side: int = 32) -> np.ndarray:
    scene = SpriteScene("navy", sprites, lifetime=1.0)
    return render_clip(scene, np.array(times), side)


class TestDrawing:
    def test_a_frame_is_what_the_renderer_of_scenes_draws(self) -> None:
        for shape in ("circle", "square", "triangle", "cross", "ring"):
            sprite = Sprite(shape, "orange", 0.37, 0.43, 0.52, (0.0, 0.0))  # type: ignore[arg-type]
            scene = Scene("navy", (SceneObject(shape, "orange", 0.43, 0.52, 0.37),))  # type: ignore[arg-type]
            for side in (32, 64):
                off = clip_of(sprite, side=side)[:, 0].astype(int) - render(scene, side)
                # of 255: scenes place an edge by points, up to 1/16 of a pixel apart
                assert np.abs(off).max() <= 17
                assert np.abs(off).mean() < 0.3

    def test_moving_by_whole_pixels_shifts_the_frame_across_the_border(self) -> None:
        sprite = Sprite("cross", "red", 0.3, 0.9, 0.2, (8 / 32, -16 / 32))
        first, last = clip_of(sprite, times=(0.0, 1.0)).transpose(1, 0, 2, 3)
        assert np.array_equal(np.roll(first, (-16, 8), (1, 2)), last)
        assert first.sum() == last.sum()

    def test_half_a_pixel_is_the_mean_of_both(self) -> None:
        square = Sprite("square", "white", 0.25, 0.5, 0.5, (1 / 64, 0.0))
        start, half, end = clip_of(square, times=(0.0, 1.0, 2.0)).transpose(1, 0, 2, 3).astype(int)
        assert np.abs(2 * half - start - end).max() <= 1

    def test_bouncing_boxes_stay_inside_and_keep_their_pace(self) -> None:
        sprite = Sprite("circle", "red", 0.3, 0.5, 0.4, (0.43, -0.31), bounces=True)
        x, y = positions(sprite, np.arange(0, 20, STEP))
        low, high = EDGE + 0.15, 1 - EDGE - 0.15
        for each, pace in ((x, 0.43), (y, 0.31)):
            assert low - 1e-9 <= each.min() < low + 0.01
            assert high - 0.01 < each.max() <= high + 1e-9
            assert np.median(np.abs(np.diff(each))) == pytest.approx(pace * STEP)

    def test_resolutions_show_the_same_clip(self) -> None:
        small, large = (MovingSprites(4, resolution=side, num_frames=2) for side in (32, 64))
        assert list(small.captions) == list(large.captions)
        down = torch.nn.functional.avg_pool3d(large.images(range(4)).double(), (1, 2, 2))
        # of 255; shapes of more pixels are made of finer cells
        assert (down - small.images(range(4))).abs().max() <= 4.0


class TestRows:
    def test_the_contract(self) -> None:
        data = MovingSprites(10, num_frames=3, resolution=16)
        assert (len(data), data.num_frames, data.usual_frame_rate) == (10, 3, 8.0)
        assert (data.num_classes, data.labels, data.name) == (0, None, "moving_sprites")
        images = data.images([9, 0, 9])
        assert (images.shape, images.dtype) == ((3, 3, 3, 16, 16), torch.uint8)
        assert torch.equal(images[0], images[2])
        assert data.mirrored_caption("a red ring moving left") == "a red ring moving right"
        with pytest.raises(IndexError, match="Row 10"):
            data.images([10])

    def test_rows_stay_whatever_the_size_and_the_process(self) -> None:
        small, large = MovingSprites(5), MovingSprites(2_000_000_000)
        assert torch.equal(small.images([4]), large.images([4]))
        assert isinstance(large.captions, WrittenCaptions)
        assert large.captions[-1] == large.captions[1_999_999_999]
        assert large.captions[2:4] == [small.captions[2], small.captions[3]]
        assert torch.equal(pickle.loads(pickle.dumps(small)).images([3]), small.images([3]))

    def test_the_first_clips_are_these(self) -> None:
        """Other ones would be another data set under the same name."""
        assert MovingSprites(4).captions[:4] == FIRST

    def test_splits_and_seeds_share_no_clip(self) -> None:
        variants = [MovingSprites(40), MovingSprites(40, split="heldout")]
        variants += [MovingSprites(40, seed=1), MovingSprites(40, split="heldout", seed=1)]
        assert (
            len({repr(each.captioned(row).scene) for each in variants for row in range(40)}) == 160
        )

    def test_the_fingerprint_tells_every_setting(self) -> None:
        changes: list[dict[str, Any]] = [
            *({}, {"split": "heldout"}, {"seed": 1}, {"count": 7}, {"resolution": 17}),
            *({"num_frames": 3}, {"num_frames": 0}, {"frame_rates": [9]}, {"tasks": ["still"]}),
            {"max_objects": 2},
        ]
        small = {"count": 6, "resolution": 16, "num_frames": 2}
        prints = [MovingSprites(**small | change).fingerprint() for change in changes]
        assert len(set(prints)) == len(prints)
        assert MovingSprites(**small).fingerprint() == prints[0]

    def test_captions_name_every_object_and_what_it_does(self) -> None:
        data = MovingSprites(120, max_objects=4)
        ways = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
        rates = {"slowly": 0.25, None: 0.5, "quickly": 1.0}
        tasks = Counter()
        for row in range(120):
            clip = data.captioned(row)
            assert isinstance(clip, CaptionedClip)
            tasks[clip.task] += 1
            asked = parse_sprites(clip.caption)
            for group, sprite in zip(asked.objects, clip.scene.sprites, strict=True):
                assert (group.kind.colour, group.kind.shape) == (sprite.colour, sprite.shape)
                assert sprite.bounces == (group.motion == "bouncing")
                if group.motion in ways:
                    assert tuple(np.sign(sprite.velocity)) == ways[group.motion]
                pace = np.hypot(*sprite.velocity)
                if group.motion != "still":
                    assert 0.9 <= pace / rates[group.speed] <= 1.1
        assert set(tasks) == set(SPRITE_TASKS)
        assert set(parse_sprites(c).count for c in data.captions[:120]) == {1, 2, 3, 4}

    def test_objects_never_touch_while_a_clip_lasts(self) -> None:
        for frames, rate in ((8, 8.0), (160, 8.0)):
            data = MovingSprites(60, num_frames=frames, frame_rates=[rate], tasks=["pair", "count"])
            for row in range(60):
                scene = data.captioned(row).scene
                until = min(scene.lifetime, 8.0)
                assert until >= min(frames / rate, 8.0)
                paths = [np.stack(positions(s, np.arange(0, until, STEP))) for s in scene.sprites]
                for i, one in enumerate(paths):
                    for j in range(i):
                        away = np.abs(one - paths[j])
                        away = np.minimum(away, 1 - away).max(0)
                        touching = (scene.sprites[i].size + scene.sprites[j].size) / 2
                        assert away.min() > touching + GAP - 1 / 32

    def test_frame_rates_change_how_far_things_move_a_frame(self) -> None:
        data = MovingSprites(60, frame_rates=[4, 16], tasks=["motion"])
        rates = data.frame_rate(range(60))
        assert set(rates.tolist()) == {4.0, 16.0}
        slow, fast = (int((rates == rate).nonzero()[0]) for rate in (4.0, 16.0))
        for row, rate in ((slow, 4), (fast, 16)):
            scene = data.captioned(row).scene
            expected = render_clip(scene, np.arange(8) / rate, 32)
            assert np.array_equal(data.image(row).numpy(), expected)

    def test_training_draws_start_and_frame_rate_from_keys(self) -> None:
        data = MovingSprites(8, frame_rates=[8, 16], tasks=["motion"])
        rows = torch.arange(8)
        keys = rng.key(0, rows)
        clips, rates = data.clips(rows, keys)
        again, _ = data.clips(rows.flip(0), keys.flip(0))
        assert torch.equal(clips, again.flip(0))
        others, other_rates = data.clips(rows, rng.key(1, rows))
        assert not torch.equal(clips, others)
        assert not torch.equal(clips, data.images(rows))
        assert set(torch.cat([rates, other_rates]).tolist()) == {8.0, 16.0}
        # objects that will meet are shown before they do
        pairs = MovingSprites(30, tasks=["pair"])
        meeting = [r for r in range(30) if pairs.captioned(r).scene.lifetime == 1.0]
        assert meeting
        shown, _ = pairs.clips(meeting, rng.key(0, torch.tensor(meeting)))
        assert torch.equal(shown, pairs.images(meeting))

    def test_pictures_are_first_frames_and_their_captions_name_no_motion(self) -> None:
        films, stills = MovingSprites(30), MovingSprites(30, num_frames=0)
        assert stills.images([5]).shape == (1, 3, 32, 32)
        for row in range(30):
            assert torch.equal(stills.image(row), films.image(row)[:, 0])
            asked = parse_sprites(films.captions[row])
            assert stills.captions[row] == str(asked.unmoved())

    def test_clip_at_is_a_function_of_its_arguments(self) -> None:
        one = clip_at(3, 5, ("pair",), 3, 1.0)
        clip_at.cache_clear()
        assert clip_at(3, 5, ("pair",), 3, 1.0) == one


FIRST = [
    "a magenta circle bouncing",
    "a white ring moving slowly up",
    "a blue square bouncing",
    "a white cross moving quickly down",
]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"split": "test"}, r"split='test' is unknown"),
        ({"count": 0}, r"data.count=0, data.num_frames=8 and data.sprite_seed=0 cannot be drawn"),
        ({"num_frames": -1}, r"data.num_frames=-1"),
        ({"resolution": 8}, r"data.resolution=8 .* Choose 16 to 512"),
        ({"max_objects": 5}, r"data.max_objects=5 is outside 1 to 4"),
        ({"tasks": ["paar"]}, r"names 'paar', .* Did you mean 'pair'\?"),
        ({"tasks": []}, r"data.tasks=\[\] must name one kind"),
        ({"frame_rates": []}, r"data.frame_rates=\[\] must name one frame rate"),
        ({"frame_rates": [2]}, r"data.frame_rates=\[2\] .* 4 to 120 frames a second"),
    ],
)
def test_other_settings_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        MovingSprites(**{"count": 10} | settings)


def config(**changes: object) -> Any:
    cfg = OmegaConf.load(CONF / "data/moving_sprites.yaml")
    return OmegaConf.merge(cfg, {"batch_size": 8, "seed": 0, "count": 40, **changes})


class TestModule:
    def test_the_config_builds_the_module(self) -> None:
        module = instantiate(config(heldout_count=9, image_ratio=0.5), "data")
        assert (module.name, len(module.train), len(module.heldout)) == ("moving_sprites", 40, 9)
        assert module.train.captions[0] != module.heldout.captions[0]
        module.with_captions = True
        batch = next(iter(module.train_dataloader()))
        assert batch["image"].shape == (8, 3, 8, 32, 32)
        still = batch["frame_rate"].isinf().tolist()
        assert 0 < sum(still) < 8
        for caption, is_still in zip(batch["caption"], still, strict=True):
            asked = parse_sprites(caption)
            assert all((group.motion is None) == is_still for group in asked.groups)

    def test_without_frames_it_holds_still_pictures(self) -> None:
        module = instantiate(config(heldout_count=9, num_frames=0), "data")
        module.with_captions = True
        batch = next(iter(module.train_dataloader()))
        assert batch["image"].shape == (8, 3, 32, 32)
        assert "frame_rate" not in batch
        asked = [parse_sprites(caption) for caption in batch["caption"]]
        assert all(group.motion is None for each in asked for group in each.groups)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"channels": 1}, r"data.channels=1 cannot show moving sprites"),
            ({"num_frames": -1}, r"num_frames=-1"),
            ({"num_classes": 3}, r"data.num_classes=3, but 'moving_sprites' has 0"),
        ],
    )
    def test_what_cannot_be_is_refused(self, changes: dict, sentence: str) -> None:
        arguments = {k: v for k, v in config(**changes).items() if k != "_target_"}
        with pytest.raises(ConfigError, match=sentence):
            sprites_module(**arguments)
