"""Reference files: published layouts are read, everything else is refused in one sentence."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from genscale.errors import DataError, ProtocolError
from genscale.metrics.moments import Moments
from genscale.metrics.network_reference import (
    NetworkReference,
    reference_from_file,
    reference_from_images,
)
from genscale.metrics.pickles import read_array_pickle
from genscale.metrics.pixels import Pixels
from genscale.metrics.reference import (
    GaussianStatistics,
    ReferenceFile,
    ReferenceOrigin,
    read_reference,
    reference_file_name,
    require_compatible,
    write_reference,
)
from genscale.rng import integers, key, normal


def _statistics(d: int, seed: int = 1) -> GaussianStatistics:
    return GaussianStatistics.of(Moments.of(normal(key(seed), (4 * d, d))))


def _pictures(n: int, side: int = 6) -> np.ndarray:
    values = integers(key(2, torch.arange(n * side * side * 3)), 256)
    return values.view(n, side, side, 3).to(torch.uint8).numpy()


class _RunsCode:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def test_the_adm_layout(tmp_path: Path) -> None:
    main, spatial = _statistics(5), _statistics(3, 2)
    pixels = _pictures(4)
    np.savez(
        tmp_path / "VIRTUAL.npz",
        mu=main.mean.numpy().astype(np.float32),
        sigma=main.covariance.numpy(),
        mu_s=spatial.mean.numpy(),
        sigma_s=spatial.covariance.numpy(),
        arr_0=pixels,
        arr_1=np.arange(4),
    )
    found = read_reference(tmp_path / "VIRTUAL.npz")
    assert found.name == "VIRTUAL"
    assert len(found.sha256) == 64
    assert set(found.statistics) == {"mu", "mu_s"}
    assert found.statistics["mu"].mean.dtype == torch.float64
    torch.testing.assert_close(found.statistics["mu_s"].covariance, spatial.covariance)
    assert found.images is not None
    assert found.images.shape == (4, 3, 6, 6)
    assert torch.equal(found.images[1, 2], torch.from_numpy(pixels[1, :, :, 2]))
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2, 3]
    assert found.origin is not None
    assert (found.origin.extractor, found.origin.mode) == ("inception_tf", "tf1_bilinear")


def test_the_edm_layouts(tmp_path: Path) -> None:
    gaussian = _statistics(5)
    arrays = {"mu": gaussian.mean.numpy(), "sigma": gaussian.covariance.numpy()}
    np.savez(tmp_path / "edm.npz", **arrays)
    content = {"num_images": 50_000, "fid": arrays, "fd_dinov2": dict(arrays)}
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(content))
    for name, count in (("edm.npz", 0), ("edm2.pkl", 50_000)):
        found = read_reference(tmp_path / name)
        assert torch.equal(found.statistics["mu"].mean, gaussian.mean)
        assert torch.equal(found.statistics["mu"].covariance, gaussian.covariance)
        assert found.statistics["mu"].count == count


def test_a_pickle_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"fid": _RunsCode()}))
    with pytest.raises(DataError, match=r"would run code when loaded \(posix.system\)"):
        read_reference(tmp_path / "evil.pkl")
    assert not (tmp_path / "executed").exists()


def test_the_unpickler_admits_arrays_and_plain_containers(tmp_path: Path) -> None:
    content = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": [np.float32(1.5), (None, True, "text")],
        "c": OrderedDict(x=np.int64(3)),
    }
    for protocol in (2, 4, 5):
        path = tmp_path / f"plain{protocol}.pkl"
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        read = read_array_pickle(path)
        np.testing.assert_array_equal(read["a"], content["a"])
        assert read["b"] == content["b"]
        assert read["c"] == content["c"]
    (tmp_path / "objects.pkl").write_bytes(pickle.dumps({"a": np.array([{}, None])}))
    with pytest.raises(DataError, match="arrays of Python objects"):
        read_array_pickle(tmp_path / "objects.pkl")
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(content)[:-20])
    with pytest.raises(DataError, match="damaged or no pickle"):
        read_array_pickle(tmp_path / "cut.pkl")
    with pytest.raises(DataError, match="No statistics file at"):
        read_array_pickle(tmp_path / "none.pkl")


def test_our_own_file_is_written_whole_and_says_what_it_is(tmp_path: Path) -> None:
    origin = ReferenceOrigin("digits", "train", "8", "pixels_2x2", "ab" * 32, "box", "cd" * 32)
    statistics = {"mu": _statistics(4)}
    features = normal(key(3), (6, 4))
    path = write_reference(tmp_path, statistics, origin, features=features)
    assert path.name == "digits-train-8-pixels_2x2-box-abababab.safetensors"
    assert path.name == reference_file_name(origin)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]  # no temporary file is left
    found = read_reference(path)
    assert found.origin == origin
    assert found.statistics["mu"].count == 16
    assert torch.equal(found.statistics["mu"].covariance, statistics["mu"].covariance)
    assert found.features is not None
    assert torch.equal(found.features, features)


def _bad_files(folder: Path) -> dict[str, Path]:
    gaussian = _statistics(3)
    mean, cov = gaussian.mean.numpy(), gaussian.covariance.numpy()
    pixels = _pictures(2)
    arrays = {
        "keys": {"mean": mean, "cov": cov},
        "half": {"mu": mean},
        "shape": {"mu": mean, "sigma": cov[:2]},
        "integers": {"mu": mean.astype(int), "sigma": cov.astype(int)},
        "nan": {"mu": mean * np.nan, "sigma": cov},
        "channels_first": {"arr_0": pixels.transpose(0, 3, 1, 2)},
        "floats": {"arr_0": pixels / 255.0},
        "objects": {"mu": np.array([{}], dtype=object), "sigma": cov},
    }
    for name, content in arrays.items():
        np.savez(folder / f"{name}.npz", **content)
    whole = (folder / "shape.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "noise.npz").write_bytes(b"not a zip file at all")
    with (folder / "single.npz").open("wb") as stream:
        np.save(stream, mean)
    (folder / "noise.safetensors").write_bytes(b"\x00" * 40)
    (folder / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    (folder / "stats.json").write_text("{}")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("keys.npz", "holds mean, cov, but a reference holds mu and sigma"),
        ("half.npz", "holds mu but no sigma"),
        ("shape.npz", r"float64\(3,\) and float64\(2, 3\), but floats of shapes"),
        ("integers.npz", r"int64\(3,\)"),
        ("nan.npz", "holds NaN or infinity"),
        ("channels_first.npz", "must be uint8"),
        ("floats.npz", "must be uint8"),
        ("objects.npz", "pickled Python objects, which could run code"),
        ("cut.npz", "damaged or no npz file"),
        ("noise.npz", "damaged or no npz file"),
        ("single.npz", "damaged or no npz file"),
        ("noise.safetensors", "damaged or no safetensors file"),
        ("list.pkl", r"holds list, but \{num_images, fid"),
        ("stats.json", "unknown ending '.json'"),
        ("none.npz", "No reference at"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(tmp_path: Path, name: str, sentence: str) -> None:
    _bad_files(tmp_path)
    with pytest.raises(DataError, match=sentence) as caught:
        read_reference(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"mu": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match="is no reference of format 1"):
        read_reference(tmp_path / "weights.safetensors")


def test_statistics_of_other_features_are_refused_unless_told_otherwise() -> None:
    network = Pixels(2)
    own = {"extractor": network.description, "mode": "box", "extractor_sha256": network.sha256}
    good = ReferenceFile("a", "", {"mu": _statistics(4)}, ReferenceOrigin(**own))
    require_compatible(good, network)
    require_compatible(ReferenceFile("pictures", ""), network)
    other = ReferenceOrigin(**(own | {"mode": "tf1_bilinear", "extractor_sha256": "00" * 32}))
    bad = ReferenceFile("b", "", {"mu": _statistics(4)}, other)
    with pytest.raises(ProtocolError, match=r"mode \(tf1_bilinear and box\), extractor_sha256"):
        require_compatible(bad, network)
    with pytest.raises(ProtocolError, match="differ in mode"):
        require_compatible(bad, network, ignore=["extractor_sha256"])
    require_compatible(bad, network, ignore=["extractor_sha256", "mode"])
    unknown = ReferenceOrigin(**(own | {"extractor_sha256": ""}))  # published files do not say
    require_compatible(ReferenceFile("c", "", {"mu": _statistics(4)}, unknown), network)


def test_a_network_describes_pictures_or_takes_its_own_statistics() -> None:
    network = Pixels(2)
    images = torch.from_numpy(_pictures(9)).permute(0, 3, 1, 2).contiguous()
    described = reference_from_images(network, images, images[:4])
    assert isinstance(described, NetworkReference)
    assert described.features is not None
    features = network(images)["pixels"]
    assert torch.equal(described.features, features)
    torch.testing.assert_close(described.statistics["pixels"].mean, features.double().mean(0))
    assert described.frechet_floor(3, 0) == described.frechet_floor(3, 0)
    floor = described.frechet_floor(100, 0)
    assert floor is not None
    assert floor[1] == 4  # all there are
    assert reference_from_images(network, images).frechet_floor(3, 0) is None
    origin = ReferenceOrigin(extractor=network.description)
    statistics = _statistics(12)
    both = ReferenceFile("f", "", {"mu": statistics}, origin, images=images)
    taken = reference_from_file(network, both)
    assert taken.statistics["pixels"] is statistics
    assert taken.features is not None
    assert reference_from_file(network, both, features=False).features is None
    # statistics of another network do not hinder a network that can read the pictures
    foreign = ReferenceFile(
        "g", "", {"mu": statistics}, ReferenceOrigin(extractor="x"), images=images
    )
    assert reference_from_file(network, foreign).statistics["pixels"].count == 9
    with pytest.raises(ProtocolError, match=r"extractor \(x and pixels_2x2\)"):
        reference_from_file(
            network, ReferenceFile("h", "", {"mu": statistics}, ReferenceOrigin(extractor="x"))
        )
    with pytest.raises(DataError, match="holds neither statistics nor pictures"):
        reference_from_file(network, ReferenceFile("i", ""))
    with pytest.raises(DataError, match="the reference has none"):
        taken.heldout_distances(10, 0)
