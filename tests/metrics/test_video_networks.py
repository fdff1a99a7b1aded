"""Pretrained networks of clips: I3D from either file, VideoMAE from a folder."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from genscale.errors import CheckpointError, ConfigError, DataError
from genscale.metrics.video import i3d
from genscale.metrics.video.i3d import I3D, i3d_input, is_torchscript
from genscale.metrics.video.i3d_graph import I3DGraph, _max_pool, _pad
from genscale.metrics.video.videomae import VideoMAE
from genscale.rng import key, normal
from tests.metrics.moving_squares import moving_squares


class _Small(nn.Module):
    """Stands in for I3D's graph: 400 numbers of clips in [-1, 1], with a batch norm's counter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 400, 1)
        self.bn = nn.BatchNorm3d(400)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x.mean(dim=(3, 4), keepdim=True))).mean(dim=(2, 3, 4))


class _Program(nn.Module):
    """Stands in for i3d_torchscript.pt: the same arguments, its own resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 1200).view(400, 3))

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        if rescale:
            x = 2.0 * x / 255.0 - 1.0
        if resize:
            x = x[:, :, :, ::2]
        if return_features:
            return F.linear(x.mean(dim=(2, 3, 4)), self.weight)
        return x


def test_the_graph_is_i3d() -> None:
    """12,697,264 parameters, the published names; even 9 frames end in one row a clip."""
    with torch.device("meta"):
        graph = I3DGraph()
        assert graph(torch.empty(2, 3, 9, 224, 224)).shape == (2, 400)
    assert sum(each.numel() for each in graph.parameters()) == 12_697_264
    names = set(graph.state_dict())
    assert {
        "Conv3d_1a_7x7.conv3d.weight",
        "Conv3d_2c_3x3.bn.running_var",
        "Mixed_3b.b0.conv3d.weight",
        "Mixed_4f.b1b.bn.weight",
        "Mixed_5c.b2a.bn.bias",
        "Mixed_5c.b3b.conv3d.weight",
        "logits.conv3d.weight",
        "logits.conv3d.bias",
    } <= names
    assert "logits.bn.weight" not in names
    assert "Mixed_3b.b0.conv3d.bias" not in names
    for shape in ((1, 3, 8, 224, 224), (1, 3, 16, 112, 112)):
        with pytest.raises(DataError, match="at least 9 frames and 224 x 224 pixels, but got"):
            graph(torch.empty(*shape, device="meta"))


def test_padding_is_tensorflows_same() -> None:
    """Output ceil(n / stride); an odd number of zeros has the larger half at the end."""
    x = normal(key(1), (1, 2, 7, 10, 11)).relu()
    assert _pad(x, (7, 7, 7), (2, 2, 2)).shape[2:] == (7 + 6, 10 + 5, 11 + 6)
    even = _pad(torch.ones(1, 1, 1, 1, 10), (1, 1, 7), (1, 1, 2))
    assert even.flatten().tolist() == [0, 0, *[1] * 10, 0, 0, 0]
    assert _max_pool(x, (1, 3, 3), (1, 2, 2)).shape[2:] == (7, 5, 6)
    unpadded = F.max_pool3d(x[..., :10, :10], 2, 2)
    torch.testing.assert_close(_max_pool(x[:, :, :6, :, :10], (2, 2, 2), (2, 2, 2)), unpadded)


def test_frames_are_squashed_to_224_without_antialiasing() -> None:
    clips = moving_squares(2, seed=1, size=300).float()[..., :250]
    made = i3d_input(clips)
    assert made.shape == (2, 3, 8, 224, 224)
    expected = F.interpolate(clips[1, :, 3][None], (224, 224), mode="bilinear")[0]
    torch.testing.assert_close(made[1, :, 3], 2 * expected / 255 - 1)
    assert float(i3d_input(torch.full((1, 3, 2, 9, 9), 255.0)).min()) == pytest.approx(1.0)
    assert float(i3d_input(torch.zeros(1, 3, 2, 9, 9)).max()) == -1.0


def test_a_state_dict_with_and_without_counters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(i3d, "I3DGraph", _Small)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph = _Small().eval()
    state = graph.state_dict()
    torch.save(state, tmp_path / "i3d_pretrained_400.pt")
    old = {name: value for name, value in state.items() if not name.endswith("tracked")}
    save_file(old, tmp_path / "old.safetensors")
    clips = moving_squares(5, seed=1, frames=17)
    networks = [
        I3D(str(tmp_path / name), clips_a_pass=2)
        for name in ("i3d_pretrained_400.pt", "old.safetensors")
    ]
    with torch.no_grad():
        expected = graph(i3d_input(clips[:, :, :16].float()))
    for network in networks:
        assert network.check() == []
        torch.testing.assert_close(network(clips)["logits"], expected)
        assert network.description == "i3d_pretrained_400"
    assert networks[0].sha256 == networks[1].sha256
    assert not networks[0].train().graph.training
    save_file({"conv.weight": state["conv.weight"]}, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"missing.*i3d_pretrained_400\.pt"):
        I3D(str(tmp_path / "half.safetensors")).prepare()


def test_a_torchscript_file_does_its_own_resizing(tmp_path: Path) -> None:
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(_Program()).save(str(path))
    assert is_torchscript(path)
    network = I3D(str(path), frames=9, clips_a_pass=2)
    clips = moving_squares(5, seed=1, frames=12)
    with torch.no_grad():
        expected = _Program()(
            clips[:, :, :9].float(), rescale=True, resize=True, return_features=True
        )
    for _ in range(3):  # profiling executors have failed on second calls
        torch.testing.assert_close(network(clips)["logits"], expected)
    assert network.description == "i3d_torchscript"
    assert len(network.sha256) == 64
    other = tmp_path / "other.pt"
    torch.jit.script(nn.ReLU()).save(str(other))
    with pytest.raises(CheckpointError, match="takes no 'rescale'"):
        I3D(str(other)).prepare()
    other.write_bytes(path.read_bytes()[:2000])
    assert not is_torchscript(other)
    with pytest.raises(CheckpointError, match="damaged"):
        I3D(str(other)).prepare()


def test_i3d_without_its_file_is_told_before_anything_starts(weights_home: Path) -> None:
    (sentence,) = I3D().check()
    assert "expected i3d_torchscript.pt" in sentence
    assert "metrics=video needs none" in sentence
    (sentence,) = I3D("nowhere.pt").check()
    assert sentence.startswith("No weights for 'i3d' at nowhere.pt")
    weights_home.mkdir()
    (weights_home / "i3d_pretrained_400.pt").write_bytes(b"")
    assert I3D().check() == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_frames=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    place = tmp_path_factory.mktemp("videomae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.VideoMAEForVideoClassification(config).save_pretrained(place)
    return place


def test_videomae_pools_all_tokens(folder: Path) -> None:
    network = VideoMAE(str(folder), frames=4, stride=2, clips_a_pass=2, normalise="none")
    assert network.check() == []
    clips = moving_squares(3, seed=1)
    pooled = network(clips)["pool"]
    assert pooled.shape == (3, network.num_features) == (3, 16)
    # what the classifier reads: its linear layer gives the logits of the whole model
    frames = clips[:, :, :8:2].transpose(1, 2).flatten(0, 1).float() / 255
    values = F.interpolate(frames, (32, 32), mode="bilinear").unflatten(0, (3, 4))
    with torch.no_grad():
        logits = network.model(pixel_values=values).logits
        torch.testing.assert_close(network.model.classifier(pooled), logits)
    tuned = VideoMAE(str(folder), frames=4, stride=2)
    assert not torch.allclose(tuned(clips)["pool"], pooled)
    assert (network.description, tuned.description) == ("videomae_none", "videomae_imagenet")
    assert network.sha256 == tuned.sha256
    assert not network.train().training
    with pytest.raises(DataError, match=r"reads 4 frames, but 8 of each clip"):
        VideoMAE(str(folder), frames=None)(clips)


def test_videomae_without_a_folder_is_told_before_anything_starts() -> None:
    (sentence,) = VideoMAE().check()
    assert sentence.startswith("metrics.features.folder is not set")
    with pytest.raises(ConfigError, match="normalise='imagnet' is unknown"):
        VideoMAE(normalise="imagnet")  # type: ignore[arg-type]
