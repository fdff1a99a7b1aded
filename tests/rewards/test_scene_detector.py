"""The analytic detector: its counts, its boxes, its gradients."""

from __future__ import annotations

import pytest
import torch

from genscale.data.scenes.dataset import Scenes
from genscale.data.scenes.grammar import COLOURS, SHAPES
from genscale.data.scenes.oracle import read_scene
from genscale.errors import ConfigError, DataError
from genscale.rewards.counting import CountLoss, suppress
from genscale.rewards.scene_detector import SceneDetector, colour_masks

KINDS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
CRITIC = CountLoss(threshold=SceneDetector.threshold)


def counts(images: torch.Tensor, names: list[str]) -> torch.Tensor:
    detector = SceneDetector()
    classes = torch.tensor([[detector.number(name) for name in names]] * len(images))
    found = detector.detect(images, classes)
    return CRITIC.count(found.logits, suppress(found.logits, found.boxes, most=12))


def agreeing(rows: range, seed: int) -> int:
    """Return on how many rows the counts of all kinds, shapes and objects are the oracle's."""
    data = Scenes(rows.stop, seed=seed)
    right = 0
    for row in rows:
        pixels = data.images([row])
        objects = read_scene(pixels[0].numpy()).objects
        seen = [f"{each.colour} {each.shape}" for each in objects]
        expected = [seen.count(kind) for kind in KINDS]
        expected += [sum(each.shape == shape for each in objects) for shape in SHAPES]
        expected += [len(objects)]
        found = counts(pixels.float() / 255.0, [*KINDS, *SHAPES, "object"])
        right += found[0].tolist() == expected
    return right


def test_counts_are_those_of_the_oracle() -> None:
    assert agreeing(range(16), seed=21) >= 15


@pytest.mark.slow
def test_counts_are_those_of_the_oracle_on_many_scenes() -> None:
    assert agreeing(range(500), seed=1) >= 475


def test_boxes_lie_on_the_objects() -> None:
    data = Scenes(8, seed=2, tasks=["colour"])
    detector = SceneDetector()
    for row in range(8):
        (each,) = data.captioned(row).scene.objects
        classes = torch.tensor([[detector.number(f"{each.colour} {each.shape}")]])
        found = detector.detect(data.images([row]).float() / 255.0, classes)
        left, top, right, bottom = found.boxes[0, 0, int(found.logits[0, 0].argmax())].tolist()
        assert (left + right) / 2 == pytest.approx(each.x, abs=0.5 / 32)
        assert (top + bottom) / 2 == pytest.approx(each.y, abs=0.5 / 32)
        assert right - left == pytest.approx(each.size, abs=1.5 / 32)


@pytest.mark.parametrize("resolution", [48, 64, 80])
def test_other_sizes_are_read_too(resolution: int) -> None:
    data = Scenes(6, seed=3, resolution=resolution, tasks=["count"])
    detector = SceneDetector()
    right = 0
    for row in range(6):
        ((name, number),) = detector.read(data.captions[row]).items()
        right += int(counts(data.images([row]).float() / 255.0, [name])) == number
    assert right == 6


def test_masks_are_shares() -> None:
    images = torch.rand(2, 3, 8, 8)
    masks = colour_masks(images)
    assert masks.shape == (2, 9, 8, 8)
    assert float(masks.min()) >= 0.0
    torch.testing.assert_close(masks[:, :8].sum(1), masks[:, 8])
    assert float(masks[:, 8].max()) <= 1.0 + 1e-6
    pure = torch.tensor([list(COLOURS.values())]).mT[..., None] / 255.0  # (1, 3, 8, 1)
    assert colour_masks(pure)[0, :8, :, 0].argmax(0).tolist() == list(range(8))


def test_gradients_of_the_soft_count_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    data = Scenes(1, seed=4, tasks=["colour"])
    detector = SceneDetector()
    ((name, _),) = detector.read(data.captions[0]).items()
    blurred = torch.nn.functional.avg_pool2d(data.images([0]).double() / 255.0, 5, 1, 2)
    blurred.requires_grad_()
    classes = torch.tensor([[detector.number(name)]])
    gentle = CountLoss(threshold=0.5, beta=0.2)  # far from saturation

    def soft(pixels: torch.Tensor) -> torch.Tensor:
        found = detector.detect(pixels, classes)
        return gentle.soft_count(found.logits, suppress(found.logits, found.boxes)).sum()

    (gradient,) = torch.autograd.grad(soft(blurred), blurred)
    assert float(gradient.abs().max()) > 1e-3  # a blurry object can be made a clear one
    for _ in range(4):
        way = torch.randn(blurred.shape, generator=generator, dtype=torch.float64) * 1e-6
        with torch.no_grad():  # so short that the same sizes, places and candidates are the best
            measured = (soft(blurred + way) - soft(blurred - way)) / 2
        assert float(measured) == pytest.approx(float((gradient * way).sum()), rel=1e-3)


def test_captions_and_classes() -> None:
    detector = SceneDetector()
    assert detector.read("two red circles and a square") == {"red circle": 2, "square": 1}
    numbers = [detector.number(name) for name in (*KINDS, *SHAPES, "object")]
    assert len(set(numbers)) == 46
    with pytest.raises(ConfigError, match="no caption of a scene"):
        detector.read("two dogs")
    with pytest.raises(DataError, match="1 channels"):
        detector.detect(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, dtype=torch.int64))
