"""Measures of single clips: VBench's arithmetic, LV-Bench's drift, CLIPSIM."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.metrics.pixels import Pixels
from genscale.metrics.suite import EvaluationSuite
from genscale.metrics.video.clipsim import CLIPSIM, TextImageModel
from genscale.metrics.video.consistency import (
    FrameConsistency,
    TemporalFlickering,
    frame_consistency,
)
from genscale.metrics.video.drift import VideoDrift, chunks_of, drift_weights, vde
from genscale.metrics.video.measures import ClipMeasure, ClipMetrics
from genscale.metrics.video.motion import (
    DynamicDegree,
    MotionSmoothness,
    MoveRule,
    flow_strength,
    linear_interpolator,
)
from genscale.metrics.video.vbench import VBenchScore, normalised, vbench_score
from genscale.rng import key, normal
from tests.metrics.moving_squares import moving_squares


def _of(measure: ClipMeasure, clips: Tensor, captions: Sequence[str] | None = None) -> float:
    metric = ClipMetrics([measure])
    metric.update(clips, captions)
    return metric.compute()[measure.name]


def _flat(levels: Sequence[int]) -> Tensor:
    """A clip whose frames are even greys: uint8 ``(1, 1, T, 8, 8)``."""
    return torch.tensor(levels, dtype=torch.uint8)[None, None, :, None, None].expand(1, 1, -1, 8, 8)


# consistency ----------------------------------------------------------------------------------


def test_consistency_is_the_mean_likeness_to_the_frame_before_and_the_first() -> None:
    """Unit vectors at 0, 60, 120 degrees: cosines 1/2, 1/2 to the one before; 1/2, -1/2 -> 0."""
    angles = torch.tensor([0.0, math.pi / 3, 2 * math.pi / 3], dtype=torch.float64)
    features = torch.stack((angles.cos(), angles.sin()), dim=1)
    lengths = torch.tensor([[1.0], [7.0], [0.1]], dtype=torch.float64)  # which do not matter
    values = frame_consistency(features * lengths)
    torch.testing.assert_close(values, torch.tensor([0.5, 0.25], dtype=torch.float64))
    with pytest.raises(DataError, match="T of at least 2"):
        frame_consistency(features[:1])


def test_a_still_clip_is_consistent_and_long_clips_count_by_their_frames() -> None:
    measure = FrameConsistency(Pixels(4), name="subject_consistency")
    still = moving_squares(3, seed=1)[:, :, :1].expand(-1, -1, 6, -1, -1)
    assert _of(measure, still) == pytest.approx(1.0, abs=1e-6)
    assert _of(measure, moving_squares(3, seed=1)) < 0.999
    long, short = moving_squares(1, seed=2, frames=9), moving_squares(1, seed=3, frames=3)
    metric = ClipMetrics([measure])
    for clip in (long, short):
        metric.update(clip)
    sums = [measure.of_clips(clip, None)[0] for clip in (long, short)]
    expected = float((sums[0][0] + sums[1][0]) / 10)  # eight later frames and two
    assert metric.compute()["subject_consistency"] == pytest.approx(expected, rel=1e-12)
    assert sums[0][1] == 8
    assert measure.description == "consistency of pixels_4x4"
    assert _of(FrameConsistency(Pixels(4), frames_a_pass=2), long) == pytest.approx(
        float(sums[0][0] / 8), rel=1e-6
    )


def test_flickering_is_one_less_the_mean_change() -> None:
    assert _of(TemporalFlickering(), _flat([10, 10, 10])) == 1.0
    assert _of(TemporalFlickering(), _flat([0, 51, 0])) == pytest.approx(1 - 51 / 255)
    assert _of(TemporalFlickering(), _flat([200, 100, 250])) == pytest.approx(1 - 125 / 255)


# motion ---------------------------------------------------------------------------------------


def test_smoothness_is_how_well_every_second_frame_is_guessed() -> None:
    measure = MotionSmoothness()
    assert _of(measure, _flat([0, 50, 100, 150, 200])) == pytest.approx(1.0, abs=1e-6)
    # the guess of the frames at 1 and 3 is 0 and 0; the last frame of six is left over
    assert _of(measure, _flat([0, 60, 0, 30, 0, 99])) == pytest.approx(1 - 45 / 255, abs=1e-6)
    before = MotionSmoothness(lambda a, b: a, method="previous")
    assert _of(before, _flat([0, 60, 200])) == pytest.approx(1 - 60 / 255, abs=1e-6)
    assert before.description == "interpolation by previous"
    torch.testing.assert_close(
        linear_interpolator(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)),
        torch.full((1, 1, 2, 2), 0.5),
    )
    with pytest.raises(ConfigError, match="interpolator without a name"):
        MotionSmoothness(lambda a, b: b)


def test_flow_strength_is_the_mean_of_the_largest_twentieth() -> None:
    flow = torch.zeros(2, 20, 20)
    flow[0].view(-1)[:20] = 3.0
    flow[1].view(-1)[:20] = 4.0  # twenty of 400 pixels move by 5
    flow[0].view(-1)[20:40] = 1.0
    assert float(flow_strength(flow)) == 5.0
    assert flow_strength(flow[None, None].expand(3, 2, -1, -1, -1)).shape == (3, 2)
    with pytest.raises(DataError, match="at least 20 pixels"):
        flow_strength(torch.zeros(2, 4, 4))


def test_a_clip_moves_where_enough_pairs_exceed_the_threshold() -> None:
    rule = MoveRule.of(16, 128, 256)
    assert (rule.threshold, rule.count) == (3.0, 4)
    assert [MoveRule.of(n, 256, 256).count for n in (2, 5, 6, 10, 14)] == [0, 1, 2, 2, 4]
    strengths = torch.tensor([[4.0, 4, 4, 3, 3], [4.0, 4, 4, 4, 3]])
    assert rule.moves(strengths).tolist() == [False, True]
    shift = 10.0

    def flow(before: Tensor, after: Tensor) -> Tensor:
        moving = (before != after).flatten(1).any(1).float()
        return moving[:, None, None, None] * torch.full((1, 2, *before.shape[2:]), shift)

    clips = torch.cat((moving_squares(3, seed=1, frames=17), _still(17)))
    measure = DynamicDegree(flow, method="difference", frame_rate=16)
    assert _of(measure, clips) == 0.75
    assert measure.settings == (("interval", 2),)
    with pytest.raises(ConfigError, match="frame_rate=0"):
        DynamicDegree(flow, method="difference", frame_rate=0)


def _still(frames: int) -> Tensor:
    return moving_squares(1, seed=9)[:, :, :1].expand(-1, -1, frames, -1, -1)


# drift ----------------------------------------------------------------------------------------


def test_vde_by_hand() -> None:
    values = [2.0, 1.0, 3.0, 2.0]  # relative drift 1/2, 1/2, 0
    assert vde(values) == pytest.approx(3 * 0.5 + 2 * 0.5)
    assert vde(values, weights="log") == pytest.approx((math.log(3) + math.log(2)) * 0.5)
    assert vde(values, weights="uniform") == 1.0
    assert vde(values, weights="late") == pytest.approx(1 * 0.5 + 2 * 0.5)
    assert vde(values, weights="late", normalise=True) == pytest.approx(1.5 / 6)
    assert vde([0.0, 1.0]) == math.inf
    assert vde([1.0]) == vde([]) == 0.0
    assert drift_weights(4, "linear") == [3, 2, 1]
    assert drift_weights(4, "late") == [1, 2, 3]
    # one per cent of drift throughout: 0.45 as published, 0.01 normalised
    assert vde([1.0] + [0.99] * 9) == pytest.approx(0.45)
    assert vde([1.0] + [0.99] * 9, normalise=True) == pytest.approx(0.01)
    # the published weights count early drift most; late ones do not
    early, late = [1.0, 0.5, 1, 1], [1.0, 1, 1, 0.5]
    assert vde(early) > vde(late)
    assert vde(early, weights="late") < vde(late, weights="late")
    with pytest.raises(ConfigError, match="weights='latest' is unknown"):
        vde(values, weights="latest")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sum to 0"):
        vde([1.0, 2.0], weights="log", normalise=True)
    with pytest.raises(DataError, match="one finite number a chunk"):
        vde([1.0, math.nan])


def test_chunks_are_equal_and_what_remains_is_dropped() -> None:
    clip = torch.arange(23)[None, None, :, None, None]
    chunks = chunks_of(clip, 5)
    assert [chunk.flatten().tolist() for chunk in chunks][::4] == [[0, 1, 2, 3], [16, 17, 18, 19]]
    assert chunks_of(clip, 24) == []
    with pytest.raises(ConfigError, match="num_chunks=0"):
        chunks_of(clip, 0)


def test_drift_of_a_measure_averages_over_videos() -> None:
    """A video that starts to flicker halfway drifts; one that never changes does not."""
    calm, restless = [100] * 12, [100] * 6 + [100, 151] * 3
    measure = VideoDrift(TemporalFlickering(), num_chunks=4)
    metric = ClipMetrics([measure])
    for levels in (calm, restless):
        metric.update(_flat(levels))
    # three frames a chunk; chunks 3 and 4 score 1 - 51/255 = 0.8
    assert metric.compute() == {"vde_temporal_flickering": pytest.approx((2 + 1) * 0.2 / 2)}
    details = metric.details["vde_temporal_flickering"]
    assert details["late"] == pytest.approx((2 + 3) / 6 * 0.2 / 2)
    assert details["n"] == 2
    assert measure.of_chunk(_flat([0, 51]), None).tolist() == pytest.approx([0.8])
    assert ("num_chunks", 4) in measure.settings
    # too short: left out with its reason
    metric = ClipMetrics([measure])
    metric.update(_flat([1, 2, 3]))
    assert metric.compute() == {}
    assert "cut into 4 chunks" in metric.reasons["vde_temporal_flickering"]
    with pytest.raises(ConfigError, match="num_chunks=1"):
        VideoDrift(TemporalFlickering(), num_chunks=1)


class _FirstFrame(ClipMeasure):
    """The grey of the first frame: 0 for a video that starts black."""

    name = "first"

    @property
    def description(self) -> str:
        return "grey of the first frame"

    def of_clips(self, clips: Tensor, captions: Sequence[str] | None) -> Tensor:
        return clips[:, :, 0].float().mean(dim=(1, 2, 3))[:, None].double() / 255


def test_infinite_drift_is_counted_not_averaged() -> None:
    metric = ClipMetrics([VideoDrift(_FirstFrame(), num_chunks=2)])
    for levels in ([0, 100], [100, 50]):
        metric.update(_flat(levels))
    assert metric.compute() == {"vde_first": 0.5}
    assert metric.details["vde_first"]["infinite"] == 1
    metric = ClipMetrics([VideoDrift(_FirstFrame(), num_chunks=2)])
    metric.update(_flat([0, 100]))
    with pytest.raises(DataError, match="infinite for all 1 videos"):
        metric.compute()


# CLIPSIM --------------------------------------------------------------------------------------


class _Shades:
    """Stands in for CLIP: a caption names a grey, and a picture of that grey fits it best."""

    label = "shades"

    def check(self) -> list[str]:
        return []

    def to(self, device: torch.device | str) -> Any:
        return self

    def prepare(self, requests: Sequence[Any]) -> Tensor:
        return torch.tensor([float(request.caption) for request in requests])

    def cosines(self, images: Tensor, handle: Tensor, index: Tensor) -> Tensor:
        return 1.0 - (images.mean(dim=(1, 2, 3)) - handle[index] / 255).abs()


def test_clipsim_is_the_mean_over_frames_of_each_clips_own_caption() -> None:
    model: TextImageModel = _Shades()
    clips = torch.cat((_flat([0, 51, 102]), _flat([255, 255, 255])))
    for at_once in (64, 2):  # frames of two clips may share a pass
        measure = CLIPSIM(model, frames_a_pass=at_once)
        rows = measure.of_clips(clips, ["51", "0"])
        torch.testing.assert_close(
            rows[:, 0], torch.tensor([1 - 0.4 / 3, 0.0], dtype=torch.float64), atol=1e-6, rtol=0
        )
    assert _of(measure, clips, ["51", "0"]) == pytest.approx((1 - 0.4 / 3) / 2, abs=1e-6)
    assert measure.description == "cosine of shades"
    metric = ClipMetrics([measure])
    metric.update(clips)
    assert metric.compute() == {}
    assert metric.reasons == {"clipsim": "the samples have no captions"}
    with pytest.raises(DataError, match="2 clips came with 1 captions"):
        metric.update(clips, ["51"])
    with pytest.raises(ConfigError, match="frames_a_pass=0"):
        CLIPSIM(model, frames_a_pass=0)


# VBench's summary -----------------------------------------------------------------------------


def test_vbench_normalises_and_weighs_its_dimensions() -> None:
    assert normalised("subject_consistency", 0.1462) == 0.0
    assert normalised("motion_smoothness", 0.9975) == pytest.approx(1.0)
    assert normalised("overall_consistency", 0.182) == pytest.approx(0.5)
    names = {
        "quality": (
            "subject_consistency",
            "background_consistency",
            "temporal_flickering",
            "motion_smoothness",
            "dynamic_degree",
            "aesthetic_quality",
            "imaging_quality",
        ),
        "semantic": (
            "object_class",
            "multiple_objects",
            "human_action",
            "color",
            "spatial_relationship",
            "scene",
            "appearance_style",
            "temporal_style",
            "overall_consistency",
        ),
    }
    best = {
        "motion_smoothness": 0.9975,
        "scene": 0.8222,
        "appearance_style": 0.2855,
        "temporal_style": 0.364,
        "overall_consistency": 0.364,
    }
    every = [name for group in names.values() for name in group]
    whole = {name: best.get(name, 1.0) for name in every}
    summary = vbench_score(whole)
    assert isinstance(summary, VBenchScore)
    assert (summary.quality, summary.semantic, summary.total) == pytest.approx((1.0, 1.0, 1.0))
    # a clip that stands still loses the half weight of 6.5, and four fifths of that in total
    still = vbench_score(whole | {"dynamic_degree": 0.0})
    assert still.quality == pytest.approx(6 / 6.5)
    assert still.total == pytest.approx((4 * 6 / 6.5 + 1) / 5)
    without = vbench_score(whole | {"object_class": 0.0})
    assert without.semantic == pytest.approx(8 / 9)
    with pytest.raises(ConfigError, match="15 are missing"):
        vbench_score({"scene": 0.5})
    with pytest.raises(ConfigError, match="Did you mean 'scene'"):
        normalised("scenes", 0.5)


# the collection -------------------------------------------------------------------------------


class _Wrong(_FirstFrame):
    name = "wrong"

    def of_clips(self, clips: Tensor, captions: Sequence[str] | None) -> Tensor:
        return torch.zeros(len(clips), dtype=torch.float64)


def test_the_collection_tells_spread_number_and_what_real_clips_score() -> None:
    metric = ClipMetrics([TemporalFlickering(), _FirstFrame()])
    metric.prepare(torch.device("cpu"))
    real = torch.cat([_flat([50, 50]), _flat([50, 101])])
    metric.look_at_real(real, seed=0)
    metric.update(_flat([10, 10]), sample_ids=torch.tensor([3]))
    metric.update(_flat([0, 255]), sample_ids=torch.tensor([1]))
    metric.update(_flat([0, 255]), sample_ids=torch.tensor([1]))  # once more: dropped
    assert metric.compute() == {"temporal_flickering": 0.5, "first": pytest.approx(5 / 255)}
    told = metric.details["temporal_flickering"]
    assert (told["n"], told["real"]) == (2, pytest.approx(0.9))
    assert told["std"] == pytest.approx(math.sqrt(0.5))
    metric.look_at_real(None, seed=0)
    metric.compute()
    with pytest.raises(ConfigError, match="'first' stands twice"):
        ClipMetrics([_FirstFrame(), _FirstFrame()])
    with pytest.raises(ConfigError, match="'a b' cannot name"):
        ClipMetrics([TemporalFlickering(name="a b")])
    with pytest.raises(DataError, match=r"gave numbers of shape \(1,\), but \(1, 1\)"):
        ClipMetrics([_Wrong()]).update(_flat([1, 2]))


def test_a_suite_names_what_is_left_out_and_why() -> None:
    measures = [TemporalFlickering(), CLIPSIM(_Shades()), VideoDrift(TemporalFlickering())]
    names = [measure.name for measure in measures]
    suite = EvaluationSuite(names, clip_measures=measures)
    assert suite.check() == []
    suite.update(moving_squares(4, seed=1))
    with pytest.warns(UserWarning, match="Left out") as said:
        results = suite.compute()
    assert "clipsim, as the samples have no captions" in str(said[0].message)
    assert "vde_temporal_flickering, as no video can be cut into 10" in str(said[1].message)
    assert [each.name for each in results] == ["temporal_flickering"]
    assert set(suite.skipped) == {"clipsim", "vde_temporal_flickering"}
    protocol = results[0].protocol
    assert protocol is not None
    assert protocol.clips is not None
    assert (protocol.clips.frames, protocol.clips.size) == (8, "16x16")
    with pytest.raises(ConfigError, match="Did you mean 'temporal_flickering'"):
        EvaluationSuite(["temporal_flicker"], clip_measures=measures)
    captioned = EvaluationSuite(names, clip_measures=measures)
    captioned.update(_flat([7] * 20).expand(2, 3, -1, -1, -1), None, None, ["7", "58"])
    values = {each.name: each.value for each in captioned.compute()}
    assert values == pytest.approx(
        {"temporal_flickering": 1.0, "clipsim": 0.9, "vde_temporal_flickering": 0.0}
    )


def test_a_chunk_of_one_frame_has_no_consistency() -> None:
    clip = normal(key(1), (1, 3, 10, 8, 8)).clamp(0, 1).mul(255).to(torch.uint8)
    nothing, something = (
        VideoDrift(FrameConsistency(Pixels(4)), num_chunks=num_chunks) for num_chunks in (10, 5)
    )
    assert bool(nothing.of_clips(clip, None).isnan().all())
    assert bool(something.of_clips(clip, None).isfinite().all())
