"""The judge, keyed subsets, and the search for copies of training pictures."""

import pytest
import torch

from genscale.data.digits import Digits
from genscale.errors import ConfigError, DataError
from genscale.metrics.agreement import Judge
from genscale.metrics.label_metrics import LabelMetrics
from genscale.metrics.novelty import (
    memorization_distance,
    memorization_informed,
    nearest_distances,
    novelty,
)
from genscale.metrics.subsets import keyed_rows, stratified_rows
from genscale.rng import key, normal


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    train, heldout = Digits("train", 8), Digits("heldout", 8)
    return (
        train.images(range(len(train))),
        train.labels,
        heldout.images(range(len(heldout))),
        heldout.labels,
    )


def test_the_judge_knows_real_digits_and_notices_swapped_labels(digits: tuple) -> None:
    images, labels, heldout, heldout_labels = digits
    judge = Judge().fit(images, labels)
    real = judge.agreement(heldout, heldout_labels)
    assert real.share > 0.97  # an RBF machine on these scans reaches about 0.99
    assert real.count == 360
    swapped = torch.where(heldout_labels == 3, 5, heldout_labels)
    result = judge.agreement(heldout, swapped)
    assert result.share == pytest.approx(real.share - 0.1 * real.per_class[3], abs=0.01)
    assert result.per_class[5] < 0.55


def test_the_judge_trains_on_a_stratified_part_of_large_sets(digits: tuple) -> None:
    images, labels, heldout, heldout_labels = digits
    judge = Judge(max_images=200).fit(images, labels)
    assert judge.num_trained == 200
    assert judge.agreement(heldout, heldout_labels).share > 0.9


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_the_judge_votes_as_the_library_does(digits: tuple, num_classes: int) -> None:
    from sklearn.svm import SVC

    images, labels, heldout, _ = digits
    rows = (labels < num_classes).nonzero().flatten()[:300]
    model = SVC(kernel="rbf", C=10.0, gamma="scale")
    model.fit((images[rows].flatten(1).double() / 255).numpy(), labels[rows].numpy())
    expected = model.predict((heldout.flatten(1).double() / 255).numpy())
    predicted = Judge().fit(images[rows], labels[rows]).predict(heldout)
    assert predicted.tolist() == expected.tolist()


def test_large_pictures_are_judged_at_32_pixels(digits: tuple) -> None:
    large = digits[0][:200].repeat_interleave(8, 2).repeat_interleave(8, 3)  # 64 px
    small = digits[0][:200].repeat_interleave(4, 2).repeat_interleave(4, 3)  # 32 px
    labels = digits[1][:200]
    judges = [Judge().fit(images, labels) for images in (large, small)]
    assert torch.equal(judges[0].predict(large), judges[1].predict(small))


def test_larger_pictures_are_averaged_and_smaller_ones_refused(digits: tuple) -> None:
    images, labels = digits[0][:200], digits[1][:200]
    judge = Judge().fit(images, labels)
    larger = images.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.equal(judge.predict(larger), judge.predict(images))
    with pytest.raises(DataError, match="knows pictures of 8x8 pixels, but got 4x8"):
        judge.predict(images[:, :, :4])


def test_a_set_of_one_class_gives_a_judge_of_one_answer(digits: tuple) -> None:
    judge = Judge().fit(digits[0][:5], torch.full((5,), 7))
    assert judge.predict(digits[2][:3]).tolist() == [7, 7, 7]


def test_an_untrained_judge_says_so(digits: tuple) -> None:
    with pytest.raises(DataError, match="has not been trained"):
        Judge().predict(digits[0])
    with pytest.raises(DataError, match="5 pictures and 4 labels"):
        Judge().fit(digits[0][:5], digits[1][:4])


def _label_metrics(digits: tuple) -> LabelMetrics:
    metric = LabelMetrics(["label_agreement", "judge_accuracy", "samples_to_real_accuracy"])
    metric.fit_judge(*digits)
    return metric


def test_samples_that_are_real_pictures_score_as_real_pictures(digits: tuple) -> None:
    images, labels, _, _ = digits
    metric = _label_metrics(digits)
    metric.update(images[:400], labels[:400])
    values = metric.compute()
    assert values["label_agreement"] > 0.99
    assert values["judge_accuracy"] > 0.97
    assert values["samples_to_real_accuracy"] > 0.9
    assert metric.details["judge_accuracy"]["n"] == 360
    assert metric.details["samples_to_real_accuracy"]["judge_n"] == 400


def test_samples_without_variety_teach_little(digits: tuple) -> None:
    images, labels, _, _ = digits
    first = torch.stack([(labels == label).nonzero()[0, 0] for label in range(10)])
    metric = _label_metrics(digits)
    metric.update(images[first].repeat(30, 1, 1, 1), labels[first].repeat(30))
    values = metric.compute()
    assert values["label_agreement"] > 0.99
    assert values["samples_to_real_accuracy"] < 0.9


def test_samples_without_labels_give_no_values(digits: tuple) -> None:
    metric = _label_metrics(digits)
    metric.update(digits[0][:5])
    assert metric.compute() == {}
    metric.update(digits[0][5:7], torch.tensor([-1, int(digits[1][6])]))
    metric.compute()
    assert metric.details["label_agreement"]["n"] == 1


def test_label_metrics_say_what_is_missing(digits: tuple) -> None:
    metric = LabelMetrics(["label_agreement"])
    metric.update(digits[0][:5], digits[1][:5])
    with pytest.raises(DataError, match="needs a judge trained on real labelled pictures"):
        metric.compute()
    metric = LabelMetrics(["judge_accuracy"])
    metric.fit_judge(digits[0], digits[1], None, None)
    metric.update(digits[0][:5], digits[1][:5])
    with pytest.raises(DataError, match="scored on real held-out pictures"):
        metric.compute()
    with pytest.raises(DataError, match=r"5 images came with labels of shape \(4,\)"):
        metric.update(digits[0][:5], digits[1][:4])
    with pytest.raises(ConfigError, match="'label_agreemnt' is no measure of labels"):
        LabelMetrics(["label_agreemnt"])


def test_stratified_rows_keep_the_proportions() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    rows = stratified_rows(labels, 20, seed=1)
    assert torch.bincount(labels[rows]).tolist() == [12, 6, 2]
    assert torch.equal(rows, rows.sort().values)
    assert torch.equal(rows, stratified_rows(labels, 20, seed=1))
    assert not torch.equal(rows, stratified_rows(labels, 20, seed=2))
    assert torch.equal(stratified_rows(labels, 100, seed=1), torch.arange(100))


def test_keyed_rows_are_a_subset() -> None:
    rows = keyed_rows(50, 10, seed=3)
    assert len(rows.unique()) == 10
    assert torch.equal(rows, keyed_rows(50, 10, seed=3))
    assert torch.equal(keyed_rows(5, 10, seed=3), torch.arange(5))


def test_copies_of_training_pictures_are_found() -> None:
    train = normal(key(1), (300, 6))
    heldout, fresh = normal(key(2), (200, 6)), normal(key(3), (200, 6))
    yardstick = nearest_distances(heldout, train)
    honest = novelty(nearest_distances(fresh, train), yardstick)
    assert honest.copy_rate < 0.05
    assert honest.ratio == pytest.approx(1.0, abs=0.15)
    half = torch.cat((train[:100] + 1e-4, fresh[:100]))
    copied = novelty(nearest_distances(half, train), yardstick)
    assert 0.5 <= copied.copy_rate < 0.55
    assert copied.median < honest.median
    assert copied.threshold == float(yardstick.quantile(0.01))


def test_distances_are_euclidean() -> None:
    train = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    distances = nearest_distances(torch.tensor([[0.0, 3.0], [1.0, 0.5]]), train)
    assert distances.tolist() == [3.0, 0.5]
    with pytest.raises(DataError, match="copies of training pictures, so they are no yardstick"):
        novelty(distances, torch.zeros(3, dtype=torch.float64))


def test_memorization_informed_distance_divides_below_the_threshold() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    # |cos| of 45 degrees is 0.7071; the row of zeros has no direction and is left out
    samples = torch.tensor([[1.0, 1.0], [-2.0, 0.0]])
    distance = memorization_distance(samples, train)
    assert distance == pytest.approx((1 - 2**-0.5) / 2, rel=1e-6)
    assert memorization_informed(4.0, 0.05) == pytest.approx(80.0)
    assert memorization_informed(4.0, 0.2) == 4.0
    assert memorization_informed(1e-9, 0.05) == 0.0
