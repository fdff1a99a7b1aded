"""Rewards that learn from the data: classifiers, and the judge of evaluations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genscale.data.base import TensorImages
from genscale.data.digits import Digits
from genscale.errors import ConfigError, DataError
from genscale.metrics.keyed_training import keyed_weights, train_classifier
from genscale.rewards.base import Request
from genscale.rewards.classifier import ClassifierReward, TrainedClassifier
from genscale.rewards.label_agreement import LabelAgreement

DIGITS = [Request(label=digit) for digit in range(10)]
BRIEF: dict[str, Any] = {"num_steps": 120, "max_images": 600, "batch_size": 64}


@pytest.fixture(scope="module")
def data() -> Any:
    return SimpleNamespace(train=Digits("train"))


@pytest.fixture(scope="module")
def heldout() -> tuple[torch.Tensor, torch.Tensor]:
    digits = Digits("heldout")
    rows = torch.arange(0, len(digits), 4)
    return digits.images(rows).float() / 255.0, digits.labels[rows]


@pytest.mark.parametrize("kind", ["linear", "convolutional", "features"])
class TestKinds:
    def test_it_tells_digits_apart(self, data: Any, heldout: Any, kind: Any) -> None:
        reward = ClassifierReward(kind=kind, **BRIEF)
        reward.fit(data)
        images, labels = heldout
        output = reward.score(images, reward.prepare(DIGITS), labels)
        assert float(output.parts["agreement"].mean()) > 0.85
        assert float(output.value.max()) <= 0.0
        wrong = reward.score(images, reward.prepare(DIGITS), (labels + 1) % 10)
        assert float(wrong.value.mean()) < float(output.value.mean()) - 2.0

    def test_gradients_raise_the_probability(self, data: Any, heldout: Any, kind: Any) -> None:
        reward = ClassifierReward(kind=kind, **BRIEF)
        reward.fit(data)
        assert reward.differentiable == (kind != "features")
        if not reward.differentiable:
            return
        image = heldout[0][:1].clone().requires_grad_()
        handle, other = reward.prepare(DIGITS), (heldout[1][:1] + 1) % 10
        loss = reward.loss(image, handle, other)
        loss.sum().backward()
        assert image.grad is not None
        step = image.detach() - 0.05 * image.grad / image.grad.norm()
        assert float(reward.loss(step, handle, other)) < float(loss.detach())


def test_trained_once_for_the_same_data_and_settings(data: Any) -> None:
    first, second = (ClassifierReward(kind="linear", **BRIEF) for _ in range(2))
    first.fit(data)
    second.fit(data)
    assert first.classifier is second.classifier
    assert isinstance(first.classifier, TrainedClassifier)
    other = ClassifierReward(kind="linear", seed=1, **BRIEF)
    other.fit(data)
    assert not torch.equal(other.classifier.weights["output"], first.classifier.weights["output"])
    assert other.label != first.label == second.label


def test_training_is_a_function_of_its_keys() -> None:
    x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    targets = (x[:, 0] > 0.2).long()
    runs = [
        train_classifier(
            keyed_weights({"output": (2, 1)}, seed),
            lambda w, rows, _: x[rows] @ w["output"].T + w["output_bias"],
            targets,
            num_steps=200,
            batch_size=8,
            learning_rate=0.1,
            seed=seed,
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0]["output"], runs[1]["output"])
    assert not torch.equal(runs[0]["output"], runs[2]["output"])
    predicted = (x @ runs[0]["output"].T + runs[0]["output_bias"]).argmax(1)
    assert float((predicted == targets).double().mean()) >= 0.95


def test_agreement_is_zero_or_one(data: Any, heldout: Any) -> None:
    reward = ClassifierReward(measure="agreement", kind="linear", **BRIEF)
    reward.fit(data)
    assert not reward.differentiable
    output = reward.score(heldout[0], reward.prepare(DIGITS), heldout[1])
    assert set(output.value.tolist()) <= {0.0, 1.0}
    assert torch.equal(output.value, output.parts["agreement"])


def test_labels_that_are_not_in_order() -> None:
    """Classes are those that the training split has."""
    pixels = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    pixels[20:] = 200
    names = [str(i) for i in range(6)]
    labels = torch.tensor([2] * 20 + [5] * 20)
    reward = ClassifierReward(kind="linear", num_steps=50)
    reward.fit(SimpleNamespace(train=TensorImages(pixels, labels, class_names=names)))
    handle = reward.prepare([Request(label=5), Request(label=2)])
    assert handle.tolist() == [1, 0]
    images = pixels[[0, 39]].float() / 255.0
    assert reward.score(images, handle, torch.tensor([1, 0])).parts["agreement"].tolist() == [1, 1]
    (told,) = reward.problems([Request(label=5), Request(label=3)])
    assert "tells labels 2 to 5 apart, but label 3 was asked for" in told
    with pytest.raises(DataError, match="pictures of 1 channels, but got 3"):
        reward.score(torch.zeros(1, 3, 8, 8), handle, torch.tensor([0]))


def test_larger_pictures_are_averaged(data: Any, heldout: Any) -> None:
    reward = ClassifierReward(kind="convolutional", **BRIEF)
    reward.fit(data)
    images, labels = heldout
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    handle = reward.prepare(DIGITS)
    torch.testing.assert_close(
        reward.score(large, handle, labels).value, reward.score(images, handle, labels).value
    )


class TestJudge:
    def test_it_is_the_judge_of_evaluations(self, data: Any, heldout: Any) -> None:
        reward = LabelAgreement(max_images=600)
        reward.fit(data)
        output = reward.score(heldout[0], reward.prepare(DIGITS), heldout[1])
        assert float(output.value.mean()) > 0.95
        assert set(output.value.tolist()) == {0.0, 1.0}

    def test_without_labels(self) -> None:
        unlabelled = SimpleNamespace(train=TensorImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8)))
        for reward in (LabelAgreement(), ClassifierReward()):
            assert reward.learns
            with pytest.raises(DataError, match="learns from labelled pictures"):
                reward.fit(unlabelled)  # type: ignore[arg-type]


def test_a_reward_that_was_not_fitted() -> None:
    with pytest.raises(ConfigError, match=r"has not seen the data.*reward.fit\(datamodule\) first"):
        ClassifierReward().prepare(DIGITS)
    with pytest.raises(ConfigError, match="has not seen the data"):
        LabelAgreement().score(torch.zeros(1, 1, 8, 8), tuple(DIGITS), torch.tensor([0]))


def test_requests_without_a_label() -> None:
    (told,) = ClassifierReward().problems([Request(caption="a dog")])
    assert "judges by the label" in told


def test_unknown_settings() -> None:
    with pytest.raises(ConfigError, match=r"kind='lineal' is unknown.*Did you mean 'linear'"):
        ClassifierReward(kind="lineal")  # type: ignore[arg-type]
