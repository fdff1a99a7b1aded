"""The inception score on laws whose score is known."""

import pytest
import torch

from genscale.errors import ConfigError
from genscale.metrics.inception_score import inception_score


def test_certain_and_balanced_predictions_score_the_number_of_classes() -> None:
    logits = 1e3 * torch.eye(5).repeat(4, 1)
    score = inception_score(logits, num_splits=4)
    assert score.mean == pytest.approx(5.0, rel=1e-9)
    assert score.std == pytest.approx(0.0, abs=1e-9)


def test_equal_predictions_score_one() -> None:
    assert inception_score(torch.ones(20, 7), num_splits=2).mean == pytest.approx(1.0)


def test_splits_are_contiguous() -> None:
    # the first half knows class 0 only, the second has two classes: scores 1 and 2
    labels = torch.tensor([0] * 6 + [0, 1] * 3)
    logits = 1e3 * torch.eye(3)[labels]
    score = inception_score(logits, num_splits=2)
    assert score.mean == pytest.approx(1.5)
    assert score.std == pytest.approx(0.5)  # population deviation of (1, 2)


def test_a_shift_of_all_logits_changes_nothing() -> None:
    logits = torch.linspace(-3, 3, 60).view(12, 5)
    far = inception_score(logits.double() + 1e4, num_splits=3)
    assert far.mean == pytest.approx(inception_score(logits, num_splits=3).mean, rel=1e-6)


def test_more_splits_than_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_splits=10 does not fit 4 samples"):
        inception_score(torch.zeros(4, 3))
