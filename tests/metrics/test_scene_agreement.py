"""Pictures against their captions: known values, the level of chance, the place in a suite."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from genscale.data.scenes.dataset import Scenes
from genscale.errors import ConfigError, DataError
from genscale.metrics.pixels import Pixels
from genscale.metrics.protocol import EvalProtocol
from genscale.metrics.scene_agreement import SCENE_MEASURES, SceneAgreement
from genscale.metrics.suite import EvaluationSuite

COUNT = 120


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes(COUNT, split="heldout", resolution=32)


@pytest.fixture(scope="module")
def samples(scenes: Scenes) -> tuple[Tensor, list[str]]:
    return scenes.images(range(COUNT)), list(scenes.captions)


def test_own_pictures_score_one_and_the_level_of_chance_is_far_below(
    samples: tuple[Tensor, list[str]], scenes: Scenes
) -> None:
    metric = SceneAgreement()
    metric.update(*samples)
    assert metric.compute() == dict.fromkeys(SCENE_MEASURES, 1.0)
    details = metric.details
    assert details["scene_all"]["n"] == details["scene_count"]["n"] == COUNT
    relations = sum(scenes.captioned(row).task == "relation" for row in range(COUNT))
    assert details["scene_relation"]["n"] == relations > 10
    chance = {name: details[name]["chance"] for name in SCENE_MEASURES}
    # one object or two are the most frequent numbers; a kind is one of 40
    assert 0.15 < chance["scene_count"] < 0.45
    assert chance["scene_colour"] < 0.1 < chance["scene_shape"]
    assert chance["scene_all"] < 0.06
    assert chance["scene_relation"] < 0.05


def test_pictures_of_other_captions_score_the_level_of_chance(
    samples: tuple[Tensor, list[str]],
) -> None:
    images, captions = samples
    matched, foreign = SceneAgreement(), SceneAgreement()
    matched.update(images, captions)
    foreign.update(images, captions[60:] + captions[:60])
    matched.compute()
    for name, value in foreign.compute().items():
        assert abs(value - matched.details[name]["chance"]) < 0.12


def test_half_of_the_pictures_wrong_is_half_of_the_score(
    samples: tuple[Tensor, list[str]],
) -> None:
    images = samples[0].clone()
    images[::2] = 0  # black shows nothing
    metric = SceneAgreement(["scene_all", "scene_count"])
    metric.update(images, samples[1])
    assert metric.compute() == {"scene_all": 0.5, "scene_count": 0.5}


def test_batches_order_duplicates_and_merging_change_nothing(
    samples: tuple[Tensor, list[str]],
) -> None:
    images, captions = samples[0].clone(), samples[1]
    images[:30] = images[30:60]
    whole, dealt, other = SceneAgreement(), SceneAgreement(), SceneAgreement()
    whole.update(images, captions)
    expected = whole.compute()
    assert 0 < expected["scene_all"] < 1
    rows = list(torch.arange(COUNT).flip(0).split(50))
    for metric, each in zip((dealt, other, dealt), rows, strict=True):
        metric.update(images[each], [captions[i] for i in each.tolist()], each)
    dealt.update(images[:3], captions[:3], torch.arange(3))  # as a sampler pads its last batch
    dealt.merge_state(other)
    assert dealt.compute() == expected
    assert dealt.num_duplicates == 3
    chances = [{name: d["chance"] for name, d in m.details.items()} for m in (whole, dealt)]
    assert chances[0] == chances[1]


def test_measures_that_no_caption_asks_for_are_absent() -> None:
    images = Scenes(4, tasks=["shape"]).images(range(4))
    metric = SceneAgreement()
    metric.update(images, list(Scenes(4, tasks=["shape"]).captions))
    assert set(metric.compute()) == {"scene_count", "scene_shape", "scene_all"}
    single = SceneAgreement(["scene_all"])
    single.update(images[:1], ["a ring"])
    single.compute()
    assert "chance" not in single.details["scene_all"]  # there is no other caption


def test_wrong_arguments_are_told(samples: tuple[Tensor, list[str]]) -> None:
    images, captions = samples
    with pytest.raises(ConfigError, match=r"'scene_color' is no .* Did you mean 'scene_colour'\?"):
        SceneAgreement(["scene_color"])
    metric = SceneAgreement()
    with pytest.raises(DataError, match=r"3 images came with 2 captions"):
        metric.update(images[:3], captions[:2])
    with pytest.raises(ConfigError, match=r"'a dog' is no caption of a scene"):
        metric.update(images[:1], ["a dog"])
    with pytest.raises(DataError, match=r"of shape \(1, 32, 32\)"):
        metric.update(images[:1, :1], captions[:1])
    with pytest.raises(DataError, match=r"SceneAgreement has seen no samples"):
        metric.compute()


def test_a_suite_of_captions_alone_needs_no_reference(
    samples: tuple[Tensor, list[str]],
) -> None:
    suite = EvaluationSuite(["scene_all", "scene_relation"])
    for rows in torch.arange(COUNT).split(50):
        captions = [samples[1][i] for i in rows.tolist()]
        suite.update(samples[0][rows], None, rows, captions)
    results = suite.compute(EvalProtocol(sampler="euler", class_law="heldout_captions"))
    assert [(result.name, result.value) for result in results] == [
        ("scene_all", 1.0),
        ("scene_relation", 1.0),
    ]
    protocol = results[0].protocol
    assert protocol is not None
    assert (protocol.features, protocol.resize, protocol.reference) == (
        "scene_oracle_1",
        "none",
        "",
    )
    assert (protocol.num_samples, protocol.sampler) == (COUNT, "euler")
    assert results[0].details["chance"] < 0.06


def test_samples_without_captions_leave_measures_of_captions_out(
    samples: tuple[Tensor, list[str]], scenes: Scenes
) -> None:
    suite = EvaluationSuite(["scene_all", "fd_pixels"], [Pixels(4)])
    train = Scenes(60, resolution=32).images(range(60))
    suite.fit_reference(train, None, None, None, "scenes-60")
    suite.update(samples[0])
    with pytest.warns(UserWarning, match=r"Left out of the evaluation: scene_all, as the samples"):
        results = suite.compute()
    assert [result.name for result in results] == ["fd_pixels"]
    assert suite.skipped == {"scene_all": "the samples have no captions"}


def test_a_suite_with_nothing_left_to_measure_says_why(
    samples: tuple[Tensor, list[str]],
) -> None:
    suite = EvaluationSuite(["scene_all"])
    suite.update(samples[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"not 'scene_all', because the samples have no capt"):
            suite.compute()
    suite = EvaluationSuite(["scene_relation", "scene_all"])
    suite.update(samples[0][:2], captions=["a ring", "two rings"])
    with pytest.warns(UserWarning, match=r"scene_relation, as no caption asks for it"):
        assert [result.name for result in suite.compute()] == ["scene_all"]


def test_the_names_of_measures_are_checked_with_all_others() -> None:
    with pytest.raises(ConfigError, match=r"'scene_al' is no metric.* Did you mean 'scene_all'\?"):
        EvaluationSuite(["scene_al"])
