"""FVD, KVD and distances of frames: arithmetic, clip_lite's judgement, suites of clips."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError, DataError, ProtocolError
from genscale.metrics import comparison
from genscale.metrics.clip_protocol import ClipProtocol
from genscale.metrics.feature_metrics import FeatureMetrics
from genscale.metrics.features import check_samples, extract
from genscale.metrics.frechet import compare_features
from genscale.metrics.holders import build_holders, feed
from genscale.metrics.kid import kernel_distance_full, polynomial_kernel
from genscale.metrics.lite import (
    ReferenceScale,
    check_least,
    mean_and_deviation,
    random_filters,
)
from genscale.metrics.moments import Moments
from genscale.metrics.network_reference import reference_from_images
from genscale.metrics.picture_lite import PictureLite
from genscale.metrics.pixels import Pixels
from genscale.metrics.probe import Probe
from genscale.metrics.protocol import EvalProtocol, require_comparable
from genscale.metrics.reference_cache import extract_once
from genscale.metrics.result_protocol import check_alike, clips_of, result_protocol
from genscale.metrics.suite import EvaluationSuite
from genscale.metrics.video.clip_lite import ClipLite
from genscale.metrics.video.clips import ClipNetwork, check_clips, flat_frames
from genscale.metrics.video.consistency import TemporalFlickering
from genscale.metrics.video.distances import VideoDistance, frechet_video, kernel_video
from genscale.metrics.video.frames import FrameFeatures
from genscale.metrics.video.protocols import FVD_PROTOCOLS, FVDProtocol, fvd_protocol
from genscale.rng import key, normal, permutation
from tests.metrics.moving_squares import moving_squares


@pytest.fixture(autouse=True)
def told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sets are warned of once a process: not what is tested here."""
    monkeypatch.setattr(comparison, "_WARNED", {(n, d) for n in NAMES for d in range(2000)})


NAMES = ("clip_lite", "frames", "frame_differences", "pixels", "probe")


@pytest.fixture(scope="module")
def real() -> Tensor:
    return moving_squares(300, seed=1)


@pytest.fixture(scope="module")
def heldout() -> Tensor:
    return moving_squares(100, seed=2)


@pytest.fixture(scope="module")
def fitted(real: Tensor) -> ClipLite:
    network = ClipLite(channels=8)
    network.fit(real, None, "squares")
    return network


# distances of features ------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "dim"), [(60, 8), (10, 24)])
def test_fvd_divides_by_n_unless_told_otherwise(count: int, dim: int) -> None:
    x, y = normal(key(1), (count, dim)), 1.3 * normal(key(2), (count + 5, dim)) + 0.2
    biased = frechet_video(x, y)
    assert biased.value == compare_features(x, y, unbiased=False).value
    assert frechet_video(x, y, unbiased=True).value == compare_features(x, y).value
    # the definition, with numpy's matrix root in place of ours
    from scipy.linalg import sqrtm

    a, b = Moments.of(x), Moments.of(y)
    cov_a, cov_b = a.covariance(unbiased=False), b.covariance(unbiased=False)
    root = torch.from_numpy(sqrtm((cov_a @ cov_b).numpy()).real)
    exact = (a.mean - b.mean).square().sum() + (cov_a + cov_b - 2 * root).trace()
    assert biased.value == pytest.approx(float(exact), rel=1e-5)


def test_the_bootstrap_tells_the_error_of_fvd() -> None:
    """Of means alone in one dimension, FVD of many sets spreads as the bootstrap of one says."""
    y = normal(key(0), (4000, 2))
    shift = torch.tensor([2.0, 0.0])
    values = [frechet_video(normal(key(n), (200, 2)) + shift, y).value for n in range(1, 25)]
    spread = float(torch.tensor(values).std())
    told = frechet_video(normal(key(1), (200, 2)) + shift, y)
    assert 0.5 * spread < told.std < 2.0 * spread
    low, high = told.interval
    assert (low, high) == (told.value - 1.96 * told.std, told.value + 1.96 * told.std)
    assert frechet_video(normal(key(1), (200, 2)) + shift, y) == told  # keyed
    assert frechet_video(normal(key(1), (200, 2)) + shift, y, seed=1).std != told.std


def test_kvd_is_the_unbiased_mmd_and_its_error_the_jackknife() -> None:
    x, y = normal(key(3), (12, 5)), normal(key(4), (20, 5)) + 0.3
    found = kernel_video(x, y)
    assert found.value == kernel_distance_full(x, y)
    without = [
        kernel_distance_full(torch.cat((x[:i], x[i + 1 :])), y) for i in range(len(x))
    ]  # by leaving each row out in turn
    values = torch.tensor(without, dtype=torch.float64)
    jackknife = math.sqrt(11 / 12 * float((values - values.mean()).square().sum()))
    assert found.std == pytest.approx(jackknife, rel=1e-9)
    assert polynomial_kernel(x[:1], x[:1]).item() == pytest.approx(
        (float(x[0] @ x[0]) / 5 + 1) ** 3, rel=1e-5
    )
    assert kernel_video(x[:2], y).details() == {}  # two clips tell no error
    assert VideoDistance(0.0, 0.5).details() == {"std": 0.5, "low": -0.98, "high": 0.98}


# clip_lite ------------------------------------------------------------------------------------


def _distorted(clips: Tensor) -> dict[str, Tensor]:
    """What may be wrong with clips, from harmless to bad."""
    frames = clips.float().transpose(1, 2).flatten(0, 1)
    blurred = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    order = permutation(key(5), clips.shape[2])
    dim = torch.linspace(1.0, 0.5, clips.shape[2])[:, None, None]
    flicker = torch.tensor([1.0, 0.7]).repeat(clips.shape[2] // 2)[:, None, None]
    noise = 25 * normal(key(6), tuple(clips.shape))
    return {
        "blurred": blurred.to(torch.uint8).unflatten(0, (len(clips), -1)).transpose(1, 2),
        "fading": (clips * dim).to(torch.uint8),
        "half as fast": clips[:, :, torch.arange(clips.shape[2]) // 2],
        "flickering": (clips * flicker).to(torch.uint8),
        "one clip": clips[:1].expand_as(clips),
        "frozen": clips[:, :, :1].expand_as(clips),
        "shuffled": clips[:, :, order],
        "noisy": (clips + noise).clamp(0, 255).to(torch.uint8),
    }


def _distances(network: ClipLite, real: Tensor, clips: Tensor) -> dict[str, float]:
    reference = reference_from_images(network, real)
    metric = FeatureMetrics(network, ["fvd", "kvd"], reference=reference)
    metric.update(clips)
    return metric.compute()


def test_clip_lite_tells_every_distortion_from_real_clips(
    fitted: ClipLite, real: Tensor, heldout: Tensor
) -> None:
    good = _distances(fitted, real, heldout)
    for name, clips in _distorted(heldout).items():
        bad = _distances(fitted, real, clips)
        assert bad["fvd"] > 1.5 * good["fvd"], name
        assert bad["kvd"] > abs(good["kvd"]) + 0.1, name
    # running backwards is nothing that these clips can show
    mirrored = _distances(fitted, real, heldout.flip(2))
    assert mirrored["fvd"] == pytest.approx(good["fvd"], rel=0.3)


def test_frames_alone_do_not_see_time_but_their_differences_do(
    real: Tensor, heldout: Tensor
) -> None:
    order = permutation(key(5), 8)
    of_frames, of_changes = FrameFeatures(Pixels(4)), FrameFeatures(Pixels(4), of="differences")
    seen = {}
    for network in (of_frames, of_changes):
        metric = FeatureMetrics(network, ["fd"], reference=reference_from_images(network, real))
        for which, clips in (("as made", heldout), ("shuffled", heldout[:, :, order])):
            metric.reset()
            metric.update(clips)
            seen[network.name, which] = metric.compute()["fd"]
        assert metric.num_samples == 100
        assert metric.details["fd"]["clips"] == 100
        assert metric.details["fd"]["n"] == 100 * (8 if network is of_frames else 7)
    assert seen["frames", "shuffled"] == pytest.approx(seen["frames", "as made"], abs=1e-6)
    assert seen["frame_differences", "shuffled"] > 2 * seen["frame_differences", "as made"]


def test_clip_lites_numbers_are_scaled_by_the_reference(fitted: ClipLite, real: Tensor) -> None:
    values = fitted(real)["clip"]
    assert values.shape == (300, fitted.num_features)
    scaled = values.double().sinh()
    torch.testing.assert_close(scaled.mean(0), 0 * scaled[0], atol=1e-3, rtol=0)
    spread = scaled.std(0, correction=0)
    assert bool(((spread - 1).abs() < 1e-3).logical_or(spread < 1e-3).all())
    assert bool((spread > 0.5).float().mean() > 0.9)  # hardly any number says nothing
    # a clip's numbers do not depend on its neighbours, nor on how many are looked at at once
    torch.testing.assert_close(fitted(real[7:9])["clip"], values[7:9], atol=1e-4, rtol=1e-4)
    again = ClipLite(channels=8, clips_a_pass=5)
    again.fit(real, None, "squares")
    torch.testing.assert_close(again(real[:9])["clip"], values[:9], atol=1e-4, rtol=1e-4)
    assert again.sha256 == fitted.sha256
    other = ClipLite(channels=8, seed=1)
    other.fit(real, None, "squares")
    assert other.sha256 != fitted.sha256
    assert other.settings["seed"] == 1
    grey = ClipLite(channels=8)
    grey.fit(real[:, :1], None, "grey")
    assert grey(real[:4, :1])["clip"].shape == (4, grey.num_features)
    assert not grey(real[:4, :1].expand(-1, 3, -1, -1, -1))["clip"].isnan().any()


def test_large_clips_are_averaged_and_two_frames_are_enough() -> None:
    network = ClipLite(size=8, channels=4)
    large = moving_squares(6, seed=3, frames=2, size=24)
    network.fit(large, None, "two frames")
    assert network(large)["clip"].isfinite().all()
    assert network.resize == "box_at_most_8"
    with pytest.raises(DataError, match="at least 2 frames, but got clips of 1"):
        network(large[:, :, :1])


# what networks take ---------------------------------------------------------------------------


def test_pictures_and_clips_are_not_mixed_up(real: Tensor) -> None:
    with pytest.raises(DataError, match=r"metric of pictures .* was given clips .*metrics=video"):
        extract(Pixels(4), real, ("pixels",))
    for network in (ClipLite(), FrameFeatures(Pixels(4))):
        with pytest.raises(DataError, match=r"reads uint8 clips .* was given pictures of shape"):
            network.check_input(real[:, :, 0])
    with pytest.raises(DataError, match=r"got torch\.float32"):
        check_clips(real.float())
    assert check_samples(real) is real
    assert check_samples(real[:, :, 0]).dim() == 4
    with pytest.raises(DataError, match=r"uint8 images of shape"):
        check_samples(real[:, 0, 0])
    suite = EvaluationSuite(["fd_pixels"], [Pixels(4)])
    suite.fit_reference(real[:, :, 0], None, None, None, "pictures")
    with pytest.raises(DataError, match="was given clips"):
        suite.update(real)
    suite = EvaluationSuite(["temporal_flickering"], clip_measures=[TemporalFlickering()])
    with pytest.raises(DataError, match="A measure of clips reads uint8 clips"):
        suite.update(real[:, :, 0])


def test_a_network_reads_the_frames_it_says(real: Tensor) -> None:
    network = ClipLite(frames=3, stride=2)
    torch.testing.assert_close(network.window(real), real[:, :, [0, 2, 4]])
    assert network.window(real[:, :1, :5]).shape[1] == 3  # five frames are enough, grey becomes RGB
    assert (network.frames_of(8), ClipLite(stride=3).frames_of(8)) == (3, 3)
    with pytest.raises(DataError, match="at least 5 frames, one in 2 of which is read, but got"):
        network.window(real[:, :, :4])
    with pytest.raises(ConfigError, match="frames of at least 2 and a stride of at least 1"):
        ClipLite(frames=1)
    with pytest.raises(ConfigError, match="size of at least 8, but size=4"):
        ClipLite(size=4)
    with pytest.raises(ConfigError, match="has not seen real samples"):
        ClipLite()(real)


def test_frames_are_evenly_spaced_and_changes_centred_on_grey(real: Tensor) -> None:
    assert FrameFeatures(Pixels(4), frames=1).pictures(real).equal(real[:, :, [4]])
    assert FrameFeatures(Pixels(4), frames=4).pictures(real).equal(real[:, :, 1::2])
    assert FrameFeatures(Pixels(4), frames=9).pictures(real).equal(real)
    changes = FrameFeatures(Pixels(4), of="differences").pictures(real)
    assert changes.shape[2] == 7
    before, after = real[:, :, 0].int(), real[:, :, 1].int()
    assert changes[:, :, 0].equal(((after - before + 256) // 2).to(torch.uint8))
    still = real[:, :, :1].expand(-1, -1, 8, -1, -1)
    assert bool((FrameFeatures(Pixels(4), of="differences").pictures(still) == 128).all())
    parts = list(flat_frames(real[:3], 5))
    assert [len(part) for part in parts] == [5, 5, 5, 5, 4]
    assert torch.cat(parts)[8].equal(real[1, :, 0])
    network = FrameFeatures(Pixels(4), frames_a_pass=5)
    features = network(real[:3])["pixels"]
    assert features.shape == (3, 8, 48)
    torch.testing.assert_close(features[1, 2], Pixels(4)(real[1:2, :, 2])["pixels"][0])
    assert network.description == "pixels_4x4 of every frames"
    assert FrameFeatures(Pixels(4), frames=2, of="differences").name == "frame_differences"
    assert (network.sha256, network.check()) == (Pixels(4).sha256, [])


def test_frames_of_a_network_that_learns_from_labels(real: Tensor) -> None:
    """Every frame of a clip has the clip's label."""
    bright = (real.float().mean(dim=(1, 2, 3, 4)) > 30).long()
    network = FrameFeatures(Probe(num_features=4, num_steps=3), frames=2)
    assert network.learns_from_labels
    network.fit(real[:40], bright[:40], "squares")
    network.prepare()
    assert network(real[:5])["hidden"].shape == (5, 2, 4)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: FrameFeatures(ClipLite()), "needs a network of pictures, but 'clip_lite'"),
        (lambda: FrameFeatures(Pixels(4), of="motion"), "of='motion' is unknown"),
        (lambda: FrameFeatures(Pixels(4), frames=0), "positive numbers, but frames=0"),
        (lambda: FeatureMetrics(Pixels(4), ["fvd"]), "'pixels' looks at pictures"),
        (lambda: FeatureMetrics(FrameFeatures(Pixels(4)), ["kvd"]), "looks at single frames"),
        (lambda: EvaluationSuite(["fvd"], [ClipLite()]), r"a number of I3D.*\(fvd_clip_lite\)"),
        (lambda: ClipProtocol(frames=0), "frames=0 and stride=1 were given"),
        (lambda: ClipProtocol(frames=8, real_clips="randon_offset"), "Did you mean 'random_off"),
    ],
)
def test_wrong_settings_are_told_in_a_sentence(build: object, sentence: str) -> None:
    with pytest.raises((ConfigError, ProtocolError), match=sentence):
        build()  # type: ignore[operator]


# suites of clips ------------------------------------------------------------------------------

VIDEO = ["fvd_clip_lite", "kvd_clip_lite", "fd_frames", "kid_frame_differences", "fd_infinity"]


def _suite(metrics: list[str] = VIDEO) -> EvaluationSuite:
    features = [
        ClipLite(channels=4),
        FrameFeatures(Pixels(4), frames=2),
        FrameFeatures(Pixels(4), of="differences"),
    ]
    return EvaluationSuite(
        metrics, features, clip_measures=[TemporalFlickering()], kid_subsets=4, kid_subset_size=50
    )


def test_a_suite_of_clips(real: Tensor, heldout: Tensor, tmp_path: Path) -> None:
    suite = _suite([*VIDEO, "temporal_flickering", "copy_rate_clip_lite"])
    suite.fit_reference(real, None, heldout, None, "squares", name="squares-16-train")
    samples = moving_squares(60, seed=7)
    for rows in (torch.arange(20, 60), torch.arange(30), torch.arange(5)):
        suite.update(samples[rows], None, rows)
    results = {each.name: each for each in suite.compute(EvalProtocol(sampler="euler"))}
    fvd, frames = results["fvd_clip_lite"], results["fd_frames"]
    assert fvd.details["n"] == 60
    assert fvd.details["duplicates_dropped"] == 15
    assert fvd.details["reference_n"] == 300
    assert fvd.details["floor"] > 0
    assert fvd.details["low"] < fvd.value < fvd.details["high"]
    assert (frames.details["n"], frames.details["clips"]) == (120, 60)
    assert results["kid_frame_differences"].details["reference_n"] == 300 * 7
    assert 0.8 < results["temporal_flickering"].details["real"] < 1
    # protocols
    assert fvd.protocol is not None
    assert fvd.protocol.clips == ClipProtocol(frames=8, size="16x16")
    assert (fvd.protocol.covariance, fvd.protocol.num_samples) == ("biased", 60)
    assert frames.protocol is not None
    assert (frames.protocol.covariance, frames.protocol.num_samples) == ("unbiased", 60)
    assert frames.protocol.features == "pixels_4x4 of 2 frames"
    flicker = results["temporal_flickering"].protocol
    assert flicker is not None
    assert (flicker.reference, flicker.features) == ("", "mean absolute frame difference")
    json.dumps([each.to_dict() for each in results.values()], allow_nan=False)
    # another batching, one by one merged
    halves = [_suite(), _suite()]
    for number, half in enumerate(halves):
        half.fit_reference(real, None, heldout, None, "squares", name="squares-16-train")
        rows = torch.arange(number, 60, 2)
        half.update(samples[rows], None, rows)
    halves[0].merge(halves[1])
    for each in halves[0].compute(EvalProtocol(sampler="euler")):
        assert each.value == pytest.approx(results[each.name].value, rel=1e-4), each.name
        assert each.protocol_hash == results[each.name].protocol_hash
    # features of frames are kept on disk like those of pictures
    kept = extract_once(
        FrameFeatures(Pixels(4)), real[:9], ("pixels",), batch_size=4, folder=tmp_path
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = extract_once(
            FrameFeatures(Pixels(4)), real[:9], ("pixels",), batch_size=4, folder=tmp_path
        )
    assert again["pixels"].equal(kept["pixels"])
    assert kept["pixels"].shape == (9, 8, 48)


def test_clips_of_another_length_are_refused_where_they_are_read_whole(real: Tensor) -> None:
    suite = _suite(["fvd_clip_lite"])
    suite.fit_reference(real, None, None, None, "squares")
    with pytest.raises(
        DataError, match=r"samples have 6 frames and the clips .* with 8, but 'clip"
    ):
        suite.update(real[:, :, :6])
    check_alike(real[:, :, :6], clips_of(real), [ClipLite(frames=4)])  # reads four of either
    check_alike(real[:, :, 0], None, [ClipLite()])
    suite = _suite(["temporal_flickering"])
    suite.fit_reference(real, None, None, None, "squares")
    suite.update(moving_squares(3, seed=4, frames=12))  # measures of single clips take any length
    assert suite.compute()[0].details["n"] == 3


def test_the_protocol_of_clips_is_part_of_the_hash_and_pictures_keep_theirs(real: Tensor) -> None:
    pictures = EvalProtocol(features="inception_tf", num_samples=50_000)
    assert "clips" not in pictures.to_dict()
    # as before there were clips
    assert EvalProtocol.adm50k().digest == "96ab2938"
    clips = pictures.replace(clips=ClipProtocol(frames=16, frame_rate=8, codec="h264_crf18"))
    assert clips.digest != pictures.digest
    assert EvalProtocol.from_dict(json.loads(clips.canonical_json())) == clips
    others = {
        pictures.replace(clips=ClipProtocol(**{"frames": 16, **change})).digest
        for change in (
            {},
            {"frames": 8},
            {"stride": 2},
            {"frame_rate": 25},
            {"size": "64x64"},
            {"real_clips": "random_offset"},
            {"codec": "h264_crf18"},
        )
    }
    assert len(others) == 7
    with pytest.raises(ProtocolError, match=r"differ in clips \(ClipProtocol\(frames=16.*None\)"):
        require_comparable(clips, pictures)
    with pytest.raises(ProtocolError, match="'fps' is no field of a protocol of clips"):
        ClipProtocol.from_dict({"frames": 8, "fps": 2})
    # what a network reads of the clips stands in its own results
    settings = comparison.MeasureSettings()
    planned = {"clip_lite": ["fvd"]}
    network = ClipLite(channels=4, frames=4, stride=2)
    network.fit(real, None, "squares")
    holders = build_holders(
        planned, [network], [], settings=settings, keep_features=True, max_judge_images=1
    )
    feed(holders["clip_lite"], real[:4], None, None, None, device=torch.device("cpu"))
    from genscale.metrics.names import plan_metrics

    protocol = result_protocol(
        plan_metrics(["fvd_clip_lite"], ["clip_lite"])[0],
        holders["clip_lite"],
        EvalProtocol(),
        settings=settings,
        reference={"reference": "squares"},
        clips=ClipProtocol(frames=8, stride=3),
    )
    assert protocol.clips == ClipProtocol(frames=4, stride=6)
    assert protocol.reference == "squares"


def test_published_protocols_have_their_numbers() -> None:
    table = {
        name: (row.num_samples, row.max_real, row.frames, row.stride)
        for name, row in FVD_PROTOCOLS.items()
    }
    assert table == {
        "fvd2048_16f": (2048, 2048, 16, 1),
        "fvd2048_128f": (2048, 2048, 128, 1),
        "fvd2048_128f_subsample8f": (2048, 2048, 16, 8),
        "ucf101_zero_shot_10k": (10_000, None, 16, 1),
        "ucf101_zero_shot_2048": (2048, None, 16, 1),
        "msrvtt_zero_shot": (59_800, 2990, 16, 1),
        "full_2048_16f": (2048, None, 16, 1),
    }
    assert isinstance(FVD_PROTOCOLS["fvd2048_16f"], FVDProtocol)
    protocol = fvd_protocol("fvd2048_128f_subsample8f", reference="sky-timelapse-256")
    assert (protocol.covariance, protocol.features) == ("biased", "i3d_torchscript")
    assert protocol.clips == ClipProtocol(frames=16, stride=8, real_clips="random_offset")
    assert len({fvd_protocol(name, reference="x").digest for name in FVD_PROTOCOLS}) >= 6
    with pytest.raises(ConfigError, match="Did you mean 'fvd2048_16f'"):
        fvd_protocol("fvd2048_16", reference="x")


def test_clip_networks_say_what_they_are() -> None:
    assert issubclass(ClipLite, ClipNetwork)
    assert ClipLite.whole_clips
    assert not ClipLite.per_frame
    assert FrameFeatures.per_frame


def test_picture_lite_sees_what_is_wrong_with_single_frames(real: Tensor, heldout: Tensor) -> None:
    network = FrameFeatures(PictureLite(channels=8), frames=2)
    network.fit(real, None, "squares")
    metric = FeatureMetrics(network, ["fd"], reference=reference_from_images(network, real))

    def distance(clips: Tensor) -> float:
        metric.reset()
        metric.update(clips)
        return metric.compute()["fd"]

    good, bad = distance(heldout), _distorted(heldout)
    for name in ("blurred", "noisy", "fading", "one clip"):
        assert distance(bad[name]) > 2 * good, name
    for name in ("shuffled", "half as fast"):
        assert distance(bad[name]) == pytest.approx(good, rel=0.5), name
    # two kinds of pictures of one data set have scales of their own
    changes = FrameFeatures(PictureLite(channels=8), of="differences")
    changes.fit(real, None, "squares")
    assert changes.sha256 != network.sha256
    pictures = PictureLite(channels=8, size=8)
    pictures.fit(real[:, :, 0], None, "squares")
    again = pictures.sha256
    pictures.fit(real[:, :, 0], None, "squares")
    assert pictures.sha256 == again
    assert pictures(real[:4, :1, 0])["picture"].shape == (4, pictures.num_features)
    assert pictures.settings["size"] == 8
    with pytest.raises(ConfigError, match="'picture_lite' needs channels of at least 2"):
        PictureLite(channels=1)


def test_scales_follow_the_reference_and_tame_outliers() -> None:
    scale = ReferenceScale(3, "lite")
    values = torch.tensor([[0.0, 5.0, 7.0], [2.0, 5.0, 9.0]])
    scale.fit(values, "data", {"a": 1})
    expected = torch.asinh(torch.tensor([[-1.0, 0, -1], [1, 0, 1], [99, 2, 0]]))
    # the second number does not vary, and stays on its own scale
    torch.testing.assert_close(scale(torch.cat((values, torch.tensor([[100.0, 7, 8]])))), expected)
    assert scale.is_fitted("data", {"a": 1})
    assert not scale.is_fitted("data", {"a": 2})
    assert not scale.is_fitted("other", {"a": 1})
    filters = random_filters((400, 3, 3, 3), 0, seed=1)
    assert float(filters.var()) == pytest.approx(2 / 27, rel=0.05)
    mean, deviation = mean_and_deviation(torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]))
    assert (mean.tolist(), deviation.tolist()) == ([[2.0, 2.0]], [[1.0, 0.0]])
    with pytest.raises(ConfigError, match="'lite' needs size of at least 8, but size=4"):
        check_least("lite", {"size": 4}, {"size": 8})
