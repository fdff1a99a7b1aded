"""Numbers of pictures beyond the size trained on: patches, seams, repetition."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from genscale.data.scenes.dataset import Scenes
from genscale.errors import ConfigError, DataError
from genscale.metrics.holders import warn_left_out
from genscale.metrics.parts import PartFeatures
from genscale.metrics.patches import PatchFeatures
from genscale.metrics.picture_lite import PictureLite
from genscale.metrics.picture_measures import PictureMeasure, PictureMetrics
from genscale.metrics.pixels import Pixels
from genscale.metrics.repetition import Repetition
from genscale.metrics.seams import Seams
from genscale.metrics.single import SampleMeasure, SampleMetrics
from genscale.metrics.suite import EvaluationSuite
from genscale.metrics.video.measures import ClipMeasure, ClipMetrics


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def of(measure: PictureMeasure, images: Tensor) -> tuple[float, dict[str, float]]:
    metric = PictureMetrics([measure])
    metric.update(images)
    value = metric.compute()[measure.name]
    return value, metric.details[measure.name]


class TestPatches:
    def test_a_grid_covers_a_picture_with_as_few_patches_as_can_be(self) -> None:
        network = PatchFeatures(Pixels(None), 4)
        assert network.corners(4, 4) == [(0, 0)]
        assert network.corners(8, 4) == [(0, 0), (4, 0)]
        assert network.corners(4, 10) == [(0, 0), (0, 3), (0, 6)]  # 10 pixels need three
        halved = PatchFeatures(Pixels(None), 4, overlap=0.5)
        assert [left for _, left in halved.corners(4, 8)] == [0, 2, 4]

    def test_the_features_are_the_networks_own(self) -> None:
        network = Pixels()
        patches: PartFeatures = PatchFeatures(network, patch=16)
        assert (patches.sha256, patches.taps) == (network.sha256, network.taps)
        assert patches.check() == network.check()

    def test_features_of_a_patch_are_those_of_the_crop(self) -> None:
        images = noise(2, 3, 12, 8)
        cut = PatchFeatures(Pixels(2), (8, 4))
        found = cut(images)["pixels"]
        assert found.shape == (2, 4, 12)
        for number, (top, left) in enumerate(cut.corners(12, 8)):
            crop = images[:, :, top : top + 8, left : left + 4]
            assert torch.equal(found[:, number], Pixels(2)(crop)["pixels"])

    def test_larger_pictures_meet_the_data_at_its_own_size(self) -> None:
        """Four pictures of the data side by side make one sample: their patches are the data."""
        real = noise(400, 3, 4, 4)
        samples = real.view(100, 2, 2, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(100, 3, 8, 8)
        suite = EvaluationSuite(["fd_pixels", "recall"], [Pixels(2)])
        suite.compare_patches((4, 4))
        suite.fit_reference(real, None, None, None, "digest")
        suite.update(samples)
        distance, recall = suite.compute()
        assert distance.value == pytest.approx(0.0, abs=1e-9)
        assert recall.value == 1.0
        assert (distance.details["n"], distance.details["pictures"]) == (400, 100)
        assert distance.protocol is not None
        assert distance.protocol.features == "pixels_2x2 of 4x4 patches"

    def test_networks_that_learn_from_pictures_learn_from_patches(self) -> None:
        network = PatchFeatures(PictureLite(size=8, channels=2), 8)
        images = noise(6, 3, 16, 8)
        network.fit(images, None, "digest")
        alone = PictureLite(size=8, channels=2)
        alone.fit(network.patches(images).flatten(0, 1), None, f"digest {network.description}")
        assert network.sha256 == alone.sha256
        network.prepare()
        assert torch.equal(network(images)["picture"][:, 1], alone(images[:, :, 8:])["picture"])

    def test_the_judge_of_labels_sees_whole_samples_at_the_size_of_the_data(self) -> None:
        suite = EvaluationSuite(
            ["label_agreement", "judge_accuracy", "samples_to_real_accuracy"], []
        )
        suite.compare_patches((4, 4))
        labels = torch.arange(20) % 2
        # class 1 is bright on the left, class 0 on the right: patches alone would tell nothing
        images = torch.zeros(20, 1, 4, 4, dtype=torch.uint8)
        images[labels == 1, ..., :2] = 200
        images[labels == 0, ..., 2:] = 200
        suite.fit_reference(images, labels, images, labels, "digest")
        large = images.repeat_interleave(2, -1).repeat_interleave(2, -2)
        wrong = labels.clone()
        wrong[:5] = 1 - wrong[:5]
        suite.update(large, wrong)
        with pytest.warns(UserWarning, match="samples_to_real_accuracy, as samples are larger"):
            found = {value.name: value.value for value in suite.compute()}
        assert found == {"label_agreement": 0.75, "judge_accuracy": 1.0}

    def test_misuse_of_patches_is_refused(self) -> None:
        with pytest.raises(DataError, match="patches of 4x4 pixels, but got pictures of 3x8"):
            PatchFeatures(Pixels(), 4)(noise(1, 3, 3, 8))
        with pytest.raises(ConfigError, match="reads clips or patches"):
            PatchFeatures(PatchFeatures(Pixels(), 4), 2)
        with pytest.raises(ConfigError, match=r"overlap=1\.0"):
            PatchFeatures(Pixels(), 4, overlap=1.0)


class TestSeams:
    def test_steps_across_borders_are_held_against_steps_elsewhere(self) -> None:
        images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
        images[..., 4:] = 30  # one step of 30 in columns; rows are even
        value, details = of(Seams(every=4), images)
        # of two borders (one in rows) one has the step; the 12 places elsewhere have none
        assert details["step_at_borders"] == pytest.approx(math.sqrt(30**2 / 2))
        assert details["step_elsewhere"] == 0.0
        assert value == pytest.approx((450 + 1 / 6) / (1 / 6))
        assert of(Seams(at=[4]), images)[0] == value
        assert of(Seams(every=3), images)[1]["step_at_borders"] == 0.0

    def test_without_seams_the_ratio_is_1(self) -> None:
        assert of(Seams(every=8), noise(50, 3, 32, 48))[0] == pytest.approx(1.0, abs=0.02)
        even = torch.full((2, 3, 32, 32), 7, dtype=torch.uint8)
        assert of(Seams(every=8), even)[0] == 1.0

    def test_borders_outside_are_none(self) -> None:
        assert Seams(every=8, at=[3, 40, 16]).borders(20) == [3, 8, 16]
        metric = PictureMetrics([Seams(every=8)])
        metric.update(noise(2, 3, 8, 8))
        assert metric.compute() == {}
        assert metric.reasons == {"seams": "no border lies inside a picture"}
        for wrong in ({"every": 1}, {"at": [0]}, {}):
            with pytest.raises(ConfigError, match="Seams are sought"):
                Seams(**wrong)


class TestRepetition:
    def test_a_picture_that_shows_one_thing_twice_is_found(self) -> None:
        once = noise(3, 3, 16, 16)
        twice = torch.cat((once, once), dim=3)
        other = torch.cat((once, noise(3, 3, 16, 16, seed=1)), dim=3)
        measure = Repetition(Pixels(None), crop=16)
        assert of(measure, twice)[0] == pytest.approx(1.0)
        assert abs(of(measure, other)[0]) < 0.2

    def test_crops_that_touch_are_no_pair(self) -> None:
        """Neighbours half a crop apart share pixels, and an even picture repeats nothing."""
        smooth = (torch.arange(32) * 8).to(torch.uint8).expand(1, 1, 16, 32)
        columns = Repetition(Pixels(4), crop=16).of_pictures(smooth)
        assert columns[0, 0] == columns[0, 1]  # of three crops in a row one pair is apart
        even = torch.full((1, 3, 16, 32), 9, dtype=torch.uint8)
        assert of(Repetition(Pixels(4), crop=16), even)[0] == pytest.approx(0.0, abs=1e-6)

    def test_small_pictures_have_none(self) -> None:
        rows = Repetition(Pixels(4), crop=16).of_pictures(noise(2, 3, 16, 31))
        assert rows.isnan().all()
        with pytest.raises(ConfigError, match="crop=1"):
            Repetition(Pixels(4), crop=1)


def test_a_suite_measures_single_pictures_beside_real_ones() -> None:
    measures = [Seams(every=8), Repetition(Pixels(4), crop=16)]
    suite = EvaluationSuite(["seams", "repetition"], picture_measures=measures)
    assert suite.single_measures == measures
    real = Scenes(8, resolution=32).images(range(8))
    suite.fit_reference(real, None, real, None, "digest")
    suite.update(real)
    seams, repetition = suite.compute()
    assert seams.value == pytest.approx(seams.details["real"])
    assert repetition.details["n"] == 8
    assert seams.protocol is not None
    assert dict(seams.protocol.settings)["every"] == 8
    with pytest.raises(DataError, match="given clips"):
        suite.update(noise(1, 3, 2, 32, 32))
    with pytest.raises(ConfigError, match=r"twice in metrics\.picture_measures"):
        PictureMetrics([Seams(every=8), Seams(every=4)])


def test_measures_of_clips_and_of_pictures_are_one_kind() -> None:
    assert issubclass(ClipMeasure, SampleMeasure)
    assert issubclass(PictureMeasure, SampleMeasure)
    assert (ClipMetrics.kind, PictureMetrics.kind) == ("clip", "picture")
    assert issubclass(ClipMetrics, SampleMetrics)


def test_what_is_left_out_is_said_once() -> None:
    warned: set[str] = set()
    with pytest.warns(UserWarning, match=r"Left out of the evaluation: a, b, as it is dark\."):
        warn_left_out({"a": "it is dark", "b": "it is dark"}, warned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_left_out({"a": "it is dark", "b": "it is dark"}, warned)
