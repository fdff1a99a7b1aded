"""Clips against captions of moving sprites: known values, the level of chance, in a suite."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from genscale.cli.building import instantiate
from genscale.data.scenes.grammar import SceneObject
from genscale.data.sprites.dataset import MovingSprites
from genscale.errors import ConfigError, DataError
from genscale.metrics.captioned import CaptionedMetric, check_captions
from genscale.metrics.clip_protocol import ClipProtocol
from genscale.metrics.holders import tell_frame_rate
from genscale.metrics.protocol import EvalProtocol
from genscale.metrics.scene_agreement import SceneAgreement, as_objects, as_rows
from genscale.metrics.suite import EvaluationSuite
from genscale.metrics.tracking_agreement import TRACK_MEASURES, TrackingAgreement

COUNT = 40


@pytest.fixture(scope="module")
def samples() -> tuple[Tensor, list[str]]:
    data = MovingSprites(COUNT, split="heldout")
    return data.images(range(COUNT)), list(data.captions)


def test_own_clips_score_one_and_the_level_of_chance_is_far_below(
    samples: tuple[Tensor, list[str]],
) -> None:
    metric = TrackingAgreement()
    metric.update(*samples)
    assert metric.compute() == dict.fromkeys(TRACK_MEASURES, 1.0)
    details = metric.details
    assert details["track_all"]["n"] == COUNT
    assert details["track_speed"]["n"] == sum("ly " in caption for caption in samples[1]) > 3
    chance = {name: details[name]["chance"] for name in TRACK_MEASURES}
    assert 0.3 < chance["track_count"] < 0.7
    assert chance["track_colour"] < 0.1 < chance["track_shape"] < 0.4
    assert chance["track_direction"] < 0.05
    assert chance["track_all"] < 0.03
    assert chance["track_steady"] == 1.0  # no caption asks for it


def test_still_pictures_shown_as_clips_move_as_nobody_asked(
    samples: tuple[Tensor, list[str]],
) -> None:
    clips = samples[0][:, :, :1].expand_as(samples[0])
    metric = TrackingAgreement()
    metric.update(clips, samples[1])
    values = metric.compute()
    assert values["track_count"] == values["track_colour"] == values["track_shape"] == 1.0
    still = sum(caption.startswith(("a still", "two still")) for caption in samples[1])
    assert values["track_direction"] < still / COUNT + 0.2
    assert values["track_all"] < 0.4


def test_batches_order_and_duplicates_change_nothing(samples: tuple[Tensor, list[str]]) -> None:
    clips, captions = samples[0].clone(), samples[1]
    clips[:10] = clips[10:20]
    whole, dealt, other = TrackingAgreement(), TrackingAgreement(), TrackingAgreement()
    whole.update(clips, captions)
    expected = whole.compute()
    assert 0.5 < expected["track_all"] < 1
    for metric, rows in ((dealt, range(25, -1, -1)), (other, range(20, COUNT))):
        ids = torch.tensor(rows)
        metric.update(clips[ids], [captions[i] for i in rows], ids)
    dealt.merge_state(other)
    assert dealt.compute() == expected
    assert dealt.num_duplicates == 6


def test_a_suite_tells_the_tracker_the_frame_rate(samples: tuple[Tensor, list[str]]) -> None:
    rows = [i for i, caption in enumerate(samples[1]) if "ly " in caption]
    for rate, expected in ((8.0, 1.0), (1.0, None)):
        suite = EvaluationSuite(["track_speed", "track_shape"])
        suite.update(samples[0][rows], captions=[samples[1][i] for i in rows])
        clips = ClipProtocol(frames=8, frame_rate=rate, size="32x32")
        speed, shape = suite.compute(EvalProtocol(clips=clips))
        slow = sum("slowly" in samples[1][i] for i in rows) / len(rows)
        assert speed.value == (slow if expected is None else expected)
        assert shape.value == 1.0
        protocol = speed.protocol
        assert protocol is not None
        assert protocol.features == "sprite_tracker_1"
        assert dict(protocol.settings) == {"frame_rate": rate}


def test_an_unknown_frame_rate_leaves_the_metric_its_own() -> None:
    metric = TrackingAgreement(frame_rate=12.0)
    for protocol in (None, EvalProtocol(), EvalProtocol(clips=ClipProtocol(frames=8))):
        tell_frame_rate([metric], protocol)
        assert metric.frame_rate == 12.0
    tell_frame_rate([metric], EvalProtocol(clips=ClipProtocol(frames=8, frame_rate=24.0)))
    assert metric.settings == (("frame_rate", 24.0),)


def test_samples_without_captions_leave_them_out(samples: tuple[Tensor, list[str]]) -> None:
    suite = EvaluationSuite(["track_all", "track_speed"])
    suite.update(samples[0][:2], captions=["a still red ring"] * 2)
    with pytest.warns(UserWarning, match=r"track_speed, as no caption asks for it"):
        assert [result.name for result in suite.compute()] == ["track_all"]


def test_the_preset_names_every_measure() -> None:
    conf = OmegaConf.load("conf/metrics/moving_sprites.yaml")
    assert [name for name in conf.metrics if name.startswith("track_")] == list(TRACK_MEASURES)
    video = OmegaConf.load("conf/metrics/video.yaml")
    suite = instantiate(OmegaConf.merge(video, {"metrics": list(conf.metrics)}), "metrics")
    assert suite.metrics == tuple(conf.metrics)


def test_objects_survive_being_kept_as_numbers() -> None:
    scene = MovingSprites(3, num_frames=1).captioned(0).scene
    found = [SceneObject(s.shape, s.colour, s.x, s.y, s.size) for s in scene.sprites]
    rows = as_rows([found, []], 5)
    assert rows.shape == (2, 5, 5)
    assert as_objects(rows[0].tolist()) == found
    assert as_objects(rows[1].tolist()) == []


def test_wrong_arguments_are_told(samples: tuple[Tensor, list[str]]) -> None:
    assert issubclass(TrackingAgreement, CaptionedMetric)
    assert issubclass(SceneAgreement, CaptionedMetric)
    with pytest.raises(ConfigError, match=r"'track_al' is no measure of moving sprites.*track_all"):
        TrackingAgreement(["track_al"])
    metric = TrackingAgreement()
    with pytest.raises(DataError, match=r"3 images came with 2 captions"):
        metric.update(samples[0][:3], samples[1][:2])
    check_captions(None, 3)
    check_captions(["a"] * 3, 3)
    with pytest.raises(ConfigError, match=r"'a dog' is no caption of moving sprites"):
        metric.update(samples[0][:1], ["a dog"])
    with pytest.raises(DataError, match=r"was given pictures"):
        metric.update(samples[0][:1, :, 0], samples[1][:1])
    with pytest.raises(DataError, match=r"TrackingAgreement has seen no samples"):
        metric.compute()
