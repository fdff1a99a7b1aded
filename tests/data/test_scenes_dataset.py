"""Scenes as a data set: rows that stay, two splits, captions that fit the pictures."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from genscale.cli.building import instantiate
from genscale.data.captioned import WrittenCaptions
from genscale.data.scenes.dataset import Scenes, scenes_module
from genscale.data.scenes.oracle import agreement
from genscale.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"


def test_pictures_fit_their_captions_in_both_splits() -> None:
    for split in ("train", "heldout"):
        scenes = Scenes(1000, split=split, resolution=32)  # type: ignore[arg-type]
        rows = [0, 999, 7, 7]
        images = scenes.images(rows)
        assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.uint8)
        assert torch.equal(images[2], images[3])
        for row, image in zip(rows, images, strict=True):
            assert agreement(image.numpy(), scenes.captions[row]).all == 1.0


def test_the_contract_of_image_data_sets() -> None:
    scenes = Scenes(10, resolution=16)
    assert (len(scenes), scenes.name, scenes.channels, scenes.resolution) == (10, "scenes", 3, 16)
    assert (scenes.num_classes, scenes.class_names, scenes.labels) == (0, (), None)
    part = scenes.some(torch.tensor([3, 1]))
    assert part.captions == [scenes.captions[3], scenes.captions[1]]
    assert torch.equal(part.image(0), scenes.image(3))
    with pytest.raises(IndexError, match="Row 10 does not exist"):
        scenes.images([10])


def test_captions_are_a_lazy_sequence() -> None:
    captions = Scenes(2_000_000_000, resolution=64).captions
    assert isinstance(captions, WrittenCaptions)
    assert len(captions) == 2_000_000_000
    assert captions[1_999_999_999] == captions[-1]
    assert captions[2:4] == [captions[2], captions[3]]
    with pytest.raises(IndexError, match="Row 2000000000 does not exist"):
        captions[2_000_000_000]


def test_rows_stay_whatever_the_size_the_order_and_what_was_kept() -> None:
    small, large = Scenes(20, resolution=32), Scenes(40_000_000, resolution=32)
    backwards = small.images(range(19, -1, -1)).flip(0)
    assert torch.equal(backwards, small.images(range(20)))  # kept by now
    assert torch.equal(backwards, large.images(range(20)))  # too large to be kept
    assert torch.equal(pickle.loads(pickle.dumps(small)).images([4]), small.images([4]))


def test_another_resolution_shows_the_same_scenes() -> None:
    small, large = Scenes(12, resolution=32), Scenes(12, resolution=64)
    assert list(small.captions) == list(large.captions)
    down = torch.nn.functional.avg_pool2d(large.images(range(12)).double(), 2)
    assert (down - small.images(range(12))).abs().max() <= 1.0


def test_splits_and_seeds_share_no_scene() -> None:
    variants = [Scenes(50, resolution=16), Scenes(50, split="heldout", resolution=16)]
    variants += [Scenes(50, resolution=16, seed=1), Scenes(50, split="heldout", seed=1)]
    scenes = {repr(each.captioned(row).scene) for each in variants for row in range(50)}
    assert len(scenes) == 200


def test_tasks_choose_the_kinds_of_captions() -> None:
    scenes = Scenes(40, tasks=["relation", "colour"])
    assert {scenes.captioned(row).task for row in range(40)} == {"relation", "colour"}


def test_the_fingerprint_tells_every_setting() -> None:
    variants = [
        Scenes(20, resolution=16),
        Scenes(21, resolution=16),
        Scenes(20, resolution=17),
        Scenes(20, resolution=16, split="heldout"),
        Scenes(20, resolution=16, seed=1),
        Scenes(20, resolution=16, tasks=["count"]),
        Scenes(20, resolution=16, max_objects=5),
    ]
    assert len({each.fingerprint() for each in variants}) == len(variants)
    assert Scenes(20, resolution=16).fingerprint() == variants[0].fingerprint()
    assert len(variants[0].fingerprint()) == 64


def test_the_first_scenes_are_these() -> None:
    """Other ones would be another data set under the same name."""
    assert Scenes(5).captions[:4] == [
        "a blue circle, a blue triangle and a yellow ring",
        "a ring",
        "three yellow squares and two blue squares",
        "a cross",
    ]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"split": "test"}, r"split='test' is unknown"),
        ({"count": 0}, r"data.count=0 and data.scene_seed=0 cannot be drawn"),
        ({"seed": -1}, r"data.scene_seed=-1 cannot be drawn"),
        ({"resolution": 8}, r"data.resolution=8 .* Choose 16 to 512"),
        ({"max_objects": 7}, r"data.max_objects=7 is outside 2 to 6"),
        ({"tasks": ["color"]}, r"names 'color', .* Did you mean 'colour'\?"),
        ({"tasks": []}, r"data.tasks=\[\] must name one kind"),
        ({"tasks": ["count", "count"]}, r"data.tasks=\[count, count\] must name .* each once"),
    ],
)
def test_other_settings_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Scenes(**{"count": 10} | settings)


def _config(**changes: object) -> OmegaConf:
    cfg = OmegaConf.load(CONF / "data/scenes.yaml")
    return OmegaConf.merge(cfg, {"batch_size": 4, "seed": 0, **changes})


def test_the_config_builds_the_module() -> None:
    module = instantiate(_config(count=30, heldout_count=8), "data")
    assert (module.name, len(module.train), len(module.heldout)) == ("scenes", 30, 8)
    assert (module.channels, module.resolution, module.num_classes) == (3, 32, 0)
    assert module.train.captions[0] != module.heldout.captions[0]
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"flip": True}, r"data.flip=true would mirror scenes"),
        ({"channels": 1}, r"data.channels=1 cannot show scenes"),
        ({"num_classes": 10}, r"data.num_classes=10, but 'scenes' has 0"),
    ],
)
def test_the_module_refuses_what_would_break_captions(changes: dict, sentence: str) -> None:
    arguments = {key: value for key, value in _config(**changes).items() if key != "_target_"}
    with pytest.raises(ConfigError, match=sentence):
        scenes_module(**arguments)


def test_a_row_is_the_same_scene_at_every_size() -> None:
    scenes = Scenes(4, resolution=32)
    assert scenes.reaches((16, 512))
    assert not scenes.reaches((15, 32))
    assert torch.equal(scenes.images_at([2, 0], (48, 48)), Scenes(4, resolution=48).images([2, 0]))
    assert torch.equal(scenes.images_at([1], (32, 32)), scenes.images([1]))
    assert scenes.some(torch.tensor([3])).images_at([0], (32, 64)).shape == (1, 3, 32, 64)
    with pytest.raises(ConfigError, match="a size of 32x600 is outside the range of scenes"):
        scenes.images_at([0], (32, 600))
