"""The suite from pictures to numbers: on digits, merged, resumed, refused."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from genscale.data.digits import Digits
from genscale.errors import ConfigError, DataError, ParallelError, ProtocolError
from genscale.metrics import comparison
from genscale.metrics.comparison import MEASURES, MeasureSettings, SetComparison, settings_of
from genscale.metrics.feature_metrics import FeatureMetrics
from genscale.metrics.inception import InceptionFID
from genscale.metrics.names import plan_metrics
from genscale.metrics.network_reference import reference_from_images
from genscale.metrics.pixels import Pixels
from genscale.metrics.probe import Probe
from genscale.metrics.protocol import EvalProtocol, MetricValue
from genscale.metrics.suite import EvaluationSuite
from genscale.rng import key, normal

QUICK = [
    "fd_probe",
    "kid_probe",
    "precision",
    "recall",
    "density",
    "coverage",
    "fd_pixels",
    "label_agreement",
    "judge_accuracy",
    "samples_to_real_accuracy",
    "copy_rate",
]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, heldout = Digits("train", 8), Digits("heldout", 8)
    return (
        train.images(range(len(train))),
        train.labels,
        heldout.images(range(len(heldout))),
        heldout.labels,
    )


@pytest.fixture(scope="module")
def samples(digits: tuple) -> tuple[Tensor, Tensor]:
    """Noisy digits, as a fair model would make them."""
    images, labels, _, _ = digits
    noise = 25 * normal(key(1), (120, 1, 8, 8))
    return (images[:120] + noise).clamp(0, 255).to(torch.uint8), labels[:120]


def _suite(metrics: list[str] = QUICK, **settings: object) -> EvaluationSuite:
    features = [Probe(num_steps=60, num_features=16), Pixels(4)]
    return EvaluationSuite(metrics, features, kid_subsets=10, **settings)


def _fit(suite: EvaluationSuite, digits: tuple) -> EvaluationSuite:
    suite.fit_reference(*digits, "digits-8", name="digits")
    return suite


@pytest.fixture(scope="module")
def fitted(digits: tuple) -> EvaluationSuite:
    return _fit(_suite(), digits)


def _values(results: list[MetricValue]) -> dict[str, float]:
    return {result.name: result.value for result in results}


def _feed(suite: EvaluationSuite, samples: tuple, batches: list[Tensor]) -> list[MetricValue]:
    suite.reset()
    for rows in batches:
        suite.update(samples[0][rows], samples[1][rows], rows)
    return suite.compute(EvalProtocol(sampler="euler", steps=10))


def test_every_metric_in_order_with_its_protocol(fitted: EvaluationSuite, samples: tuple) -> None:
    results = _feed(fitted, samples, list(torch.arange(120).split(50)))
    assert [result.name for result in results] == QUICK
    assert fitted.skipped == {}
    values = _values(results)
    assert 0 < values["fd_pixels"] < values["fd_probe"]
    assert values["label_agreement"] > 0.95
    assert 0 <= values["copy_rate"] <= 1
    by_name = {result.name: result for result in results}
    fd = by_name["fd_probe"]
    assert fd.details["n"] == 120
    assert fd.details["reference_n"] == 1437
    assert fd.details["floor_n"] == 120  # as many held-out pictures as samples
    assert 0 < fd.details["floor"] < values["fd_probe"]
    assert all(result.details["seconds"] >= 0 for result in results)
    assert fd.protocol is not None
    assert fd.protocol_hash == fd.protocol.digest
    assert (fd.protocol.sampler, fd.protocol.num_samples) == ("euler", 120)
    assert (fd.protocol.reference, fd.protocol.features) == ("digits", "probe_16")
    assert by_name["precision"].protocol_hash == by_name["coverage"].protocol_hash
    assert by_name["precision"].protocol_hash != fd.protocol_hash
    assert set(fitted.protocols) >= {result.protocol_hash for result in results}
    json.dumps([result.to_dict() for result in results], allow_nan=False)
    assert {"reference", "features", "fd_probe"} <= set(fitted.seconds)


def test_batches_order_and_duplicates_change_nothing(
    fitted: EvaluationSuite, samples: tuple
) -> None:
    expected = _feed(fitted, samples, [torch.arange(120)])
    shuffled = list(torch.arange(120).flip(0).split(17))
    padded = [*shuffled, torch.tensor([0, 1, 2])]  # as a sampler pads its last batch
    results = _feed(fitted, samples, padded)
    assert _values(results) == _values(expected)
    assert results[0].details["duplicates_dropped"] == 3
    assert results[0].protocol_hash == expected[0].protocol_hash


def test_two_merged_suites_equal_one(digits: tuple, samples: tuple) -> None:
    metrics = ["fd_pixels", "kid_pixels", "label_agreement", "copy_rate"]
    both = []
    for rows in (torch.arange(0, 120, 2), torch.arange(1, 120, 2)):
        half = _fit(EvaluationSuite(metrics, [Pixels(4)]), digits)
        half.update(samples[0][rows], samples[1][rows], rows)
        both.append(half)
    whole = _fit(EvaluationSuite(metrics, [Pixels(4)]), digits)
    expected = _values(_feed(whole, samples, [torch.arange(120)]))
    both[0].merge(both[1])
    assert _values(both[0].compute()) == expected
    assert _values(both[1].compute()) != expected  # the other one stays as it was
    with pytest.raises(DataError, match="cannot take in one of fd_pixels"):
        both[0].merge(EvaluationSuite(["fd_pixels"], [Pixels(4)]))


def test_streamed_moments_merge_to_the_same_distance(digits: tuple, samples: tuple) -> None:
    """InceptionFID's taps have a length of their own, so their moments can be streamed."""

    class Fixed(Pixels):
        def __init__(self) -> None:
            super().__init__(4)
            self.taps = {"pixels": 16}

    reference = reference_from_images(Fixed(), digits[0])
    kept = FeatureMetrics(Fixed(), ["fd"], reference=reference)
    kept.update(samples[0])
    halves = [
        FeatureMetrics(Fixed(), ["fd"], reference=reference, keep_features=False) for _ in range(2)
    ]
    for number, half in enumerate(halves):
        rows = torch.arange(number, 120, 2)
        half.update(samples[0][rows], rows)
        half.update(samples[0][rows[:5]], rows[:5])  # seen already: counted once
    assert "rows_main" not in halves[0].metric_state
    halves[0].merge_state(halves[1])
    assert halves[0].compute()["fd"] == pytest.approx(kept.compute()["fd"], rel=1e-5)
    assert halves[0].details["fd"]["n"] == 120
    halves[0].merge_state(halves[1])  # the same samples again cannot be taken out of moments
    with pytest.raises(DataError, match="180 samples were streamed but only 120"):
        halves[0].compute()
    with pytest.raises(DataError, match="Merge metrics of one kind"):
        halves[0].merge_state({})


def test_a_worse_model_scores_worse(fitted: EvaluationSuite, digits: tuple, samples: tuple) -> None:
    good = _values(_feed(fitted, samples, [torch.arange(120)]))
    noise = (128 + 60 * normal(key(2), (120, 1, 8, 8))).clamp(0, 255).to(torch.uint8)
    bad = _values(_feed(fitted, (noise, samples[1]), [torch.arange(120)]))
    for name in ("fd_probe", "kid_probe", "fd_pixels"):
        assert bad[name] > 2 * good[name]
    for name in ("precision", "coverage", "label_agreement", "samples_to_real_accuracy"):
        assert bad[name] < good[name]
    copies = _values(_feed(fitted, (digits[0][:120], digits[1][:120]), [torch.arange(120)]))
    assert copies["copy_rate"] == 1.0


def test_what_the_reference_does_not_allow_is_left_out_by_name(
    digits: tuple, samples: tuple
) -> None:
    suite = _suite()
    suite.fit_reference(digits[0], None, None, None, "unlabelled")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = _feed(suite, samples, [torch.arange(120)])
    assert [str(each.message) for each in said] == [
        "Left out of the evaluation: fd_probe, kid_probe, precision, recall, density, coverage, as "
        "'probe' learns from labels and the reference has none.",
        "Left out of the evaluation: label_agreement, judge_accuracy, samples_to_real_accuracy, as "
        "the reference has no labels.",
        "Left out of the evaluation: copy_rate, as the reference has no held-out pictures.",
    ]
    assert [result.name for result in results] == ["fd_pixels"]
    assert suite.skipped["label_agreement"] == "the reference has no labels"
    assert suite.skipped["copy_rate"] == "the reference has no held-out pictures"
    assert set(suite.skipped) == set(QUICK) - {"fd_pixels"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        _feed(suite, samples, [torch.arange(120)])
    with pytest.raises(DataError, match="No metric can be computed with this reference: not 'copy"):
        EvaluationSuite(["copy_rate"]).fit_reference(digits[0], None, None, None, "x")


def test_samples_without_labels_leave_label_metrics_out(digits: tuple, samples: tuple) -> None:
    suite = _fit(EvaluationSuite(["fd_pixels", "label_agreement"], [Pixels(4)]), digits)
    suite.update(samples[0])
    with pytest.warns(UserWarning, match="label_agreement, as the samples have no labels"):
        results = suite.compute()
    assert [result.name for result in results] == ["fd_pixels"]


def test_a_small_set_is_warned_of_once(digits: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_WARNED", set())
    suite = _fit(EvaluationSuite(["fd_pixels"], [Pixels(4)]), digits)
    suite.update(digits[0][:10])
    with pytest.warns(UserWarning, match="10 samples in 16 dimensions"):
        assert suite.compute()[0].details["route"] == "features"


def test_a_reference_file_of_pictures(tmp_path: Path, digits: tuple, samples: tuple) -> None:
    pixels = digits[0].permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    np.savez(tmp_path / "real.npz", arr_0=pixels, arr_1=digits[1].numpy())
    metrics = ["fd_probe", "precision", "label_agreement", "copy_rate"]
    suite = _suite(metrics, reference=str(tmp_path / "real.npz"))
    assert suite.check() == []
    suite.update(samples[0].expand(-1, 3, -1, -1), samples[1])
    with pytest.warns(UserWarning, match="copy_rate"):
        values = suite.compute()
    assert [value.name for value in values] == ["fd_probe", "precision", "label_agreement"]
    assert values[0].protocol is not None
    assert values[0].protocol.reference == "real"
    assert values[0].protocol.reference_count == 1437
    missing = EvaluationSuite(["fd_pixels"], [Pixels(4)], reference="nowhere.npz").check()
    assert missing == [
        "No reference at nowhere.npz. Give an existing npz, pkl or safetensors file."
    ]


def test_fid_against_a_file_of_statistics(
    tmp_path: Path, inception_file: Path, samples: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_WARNED", set())
    network = InceptionFID(str(inception_file))
    features = network(samples[0][:3])
    statistics = {
        "mu": features["2048"].double().mean(0).numpy(),
        "sigma": torch.eye(2048, dtype=torch.float64).numpy() * 1e-4,
        "mu_s": features["spatial"].double().mean(0).numpy(),
        "sigma_s": torch.eye(2023, dtype=torch.float64).numpy() * 1e-4,
    }
    np.savez(tmp_path / "VIRTUAL.npz", **statistics)
    # precision reads features of pictures, and this file has none
    suite = EvaluationSuite(
        ["fid", "inception_score", "precision"],
        [network],
        reference=str(tmp_path / "VIRTUAL.npz"),
        num_samples=3,
    )
    suite.update(samples[0][:3], samples[1][:3])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = suite.compute()
    assert "3 samples in 2048 dimensions" in str(said[0].message)
    assert "precision, as the reference has statistics, but no" in str(said[1].message)
    values = _values(results)
    assert list(values) == ["fid", "inception_score"]
    # equal means; the samples' covariance commutes with the multiple c of the identity, so
    # FD = tr S + 2048 c - 2 sqrt(c) tr S^(1/2)
    centred = features["2048"].double() - features["2048"].double().mean(0)
    roots = torch.linalg.svdvals(centred) / 2**0.5
    exact = float(roots.square().sum() + 2048e-4 - 2 * 1e-2 * roots.sum())
    assert values["fid"] == pytest.approx(exact, rel=1e-6)
    assert results[0].protocol is not None
    assert results[0].protocol.features == "inception_tf"
    assert results[0].protocol.resize == "tf1_bilinear"
    assert results[1].protocol is not None
    assert results[1].protocol.reference == ""  # an inception score compares with nothing
    wrong = EvaluationSuite(["fid"], [InceptionFID(str(inception_file), mode="clean")])
    with pytest.raises(ProtocolError, match=r"mode \(tf1_bilinear and pil_bicubic_antialias\)"):
        wrong.read_reference(tmp_path / "VIRTUAL.npz")


def test_a_demanded_number_of_samples_is_counted(digits: tuple, samples: tuple) -> None:
    suite = _fit(EvaluationSuite(["fd_pixels"], [Pixels(4)], num_samples=100), digits)
    assert suite.check() == suite.check(num_samples=100) == []
    assert "demand 100 samples, but 50" in suite.check(num_samples=50)[0]
    suite.update(samples[0], sample_ids=torch.arange(120))
    with pytest.raises(ProtocolError, match="demand 100 samples, but 120 different ones"):
        suite.compute()
    suite.reset()
    suite.update(samples[0], sample_ids=torch.arange(120) % 100)
    assert suite.compute()[0].details["n"] == 100


def test_names_say_measure_and_network() -> None:
    plan = plan_metrics(
        ["fd", "kid_pixels", "fd_infinity_pixels", "copy_rate", "copy_rate_probe"],
        ["probe", "pixels"],
    )
    assert [(each.measure, each.network) for each in plan] == [
        ("fd", "probe"),
        ("kid", "pixels"),
        ("fd_infinity", "pixels"),
        ("copy_rate", "every_pixel"),
        ("copy_rate", "probe"),
    ]
    (fid,) = plan_metrics(["sfid"], ["probe", "inception"])
    assert (fid.measure, fid.network) == ("sfd", "inception")


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        (["fd_prob"], r"'fd_prob' is no metric.*Did you mean 'fd_probe'"),
        (["fid"], r"'fid' is a number of the FID Inception network.*has probe, pixels"),
        (["fd_probe", "fd_probe"], "'fd_probe' stands twice in metrics"),
        (["inception_score_probe"], "reads the features 'logits_unbiased', but the network"),
        (["sfd_pixels"], "reads the features 'spatial'"),
    ],
)
def test_wrong_names_are_refused_when_the_suite_is_built(metrics: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        _suite(metrics)


def test_networks_need_names_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"'pixels' stands twice in metrics\.features"):
        EvaluationSuite(["fd"], [Pixels(4), Pixels(8)])
    EvaluationSuite(["fd_fine"], [Pixels(4), Pixels(8, name="fine")])
    with pytest.raises(ConfigError, match=r"metrics\.features is empty"):
        EvaluationSuite(["fd"])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # torchmetrics says the same
def test_misuse_is_told_in_a_sentence(
    digits: tuple, samples: tuple, weights_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = EvaluationSuite(["fd_pixels"], [Pixels(4)])
    with pytest.raises(DataError, match="compares samples with real pictures, but no reference"):
        suite.update(samples[0])
    _fit(suite, digits)
    with pytest.raises(DataError, match="has seen no samples"):
        suite.compute()
    with pytest.raises(DataError, match=r"uint8 images"):
        suite.update(samples[0].float())
    with pytest.raises(DataError, match=r"120 images came with sample_ids of shape \(7,\)"):
        suite.update(samples[0], sample_ids=torch.arange(7))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ParallelError, match="Pass the global numbers of the samples"):
        suite.update(samples[0])
    (sentence,) = EvaluationSuite(["fid"], [InceptionFID()]).check()
    assert "No weights for 'inception'" in sentence


def test_every_measure_of_features_runs(digits: tuple, samples: tuple) -> None:
    network = Pixels(4)
    reference = reference_from_images(network, digits[0], digits[2])
    features = {
        "main": network(samples[0])["pixels"],
        "logits": normal(key(5), (120, 7)),
        "spatial": network(samples[0])["pixels"],
    }
    set_comparison = SetComparison(
        features,
        {},
        reference,
        taps={"main": "pixels", "spatial": "pixels", "logits": "logits"},
        network="pixels",
        settings=MeasureSettings(kid_subsets=3),
    )
    values = {name: set_comparison.measure(name)[0] for name in MEASURES}
    assert values["sfd"] == values["fd"]
    assert values["fd_infinity"] < values["fd"]
    assert values["kid_full"] == pytest.approx(values["kid"], abs=2e-3)
    assert values["mifid"] >= values["fd"]
    assert 1 < values["inception_score"] < 7
    assert settings_of("inception_score", MeasureSettings()) == (("num_splits", 10),)
    alone = SetComparison(
        features, {}, None, taps={"main": "pixels"}, network="pixels", settings=MeasureSettings()
    )
    with pytest.raises(DataError, match="have no reference to be compared with"):
        alone.measure("fd")
