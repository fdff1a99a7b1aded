"""Scaled skips (arXiv:2310.13545) in DiMR and LaMamba: where the factors go, and what they fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genscale.backbones.base import Backbone
from genscale.backbones.dimr import DiMR
from genscale.backbones.lamamba import LaMamba
from genscale.conditioning.base import Conditioning
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters import dimr as dimr_files
from genscale.io.converters import lamamba as lamamba_files
from genscale.io.keys import refuse_scaled_skips
from genscale.layers.skip_scale import SkipScale, TokenGate

KINDS = ("constant", "geometric", "gate_shared", "gate", "channel")


def dimr(**changes: Any) -> DiMR:
    sizes = {"hidden_sizes": [16, 8], "depths": [5, 3], "num_heads": 2, "kernel_sizes": 3}
    return _alive(DiMR(input_size=8, in_channels=1, num_classes=3, **sizes, **changes))


def lamamba(**changes: Any) -> LaMamba:
    sizes = {
        "hidden_sizes": [8, 16, 32, 32],
        "depths": [1, 1, 0, 0],
        "bottleneck_depth": 1,
        "num_heads": 2,
        "window_size": 4,
    }
    return _alive(LaMamba(input_size=16, in_channels=1, num_classes=3, **sizes, **changes))


def _alive(backbone: Any) -> Any:
    """Move every weight by the same numbers in every model, whatever factors it has besides."""
    own = {n: p for n, p in backbone.named_parameters() if "skip_factors" not in n}
    with torch.no_grad():
        for i, parameter in enumerate(own.values()):
            generator = torch.Generator().manual_seed(i)
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return backbone.eval()


MODELS: dict[str, Callable[..., Any]] = {"dimr": dimr, "lamamba": lamamba}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param


@torch.no_grad()
def predict(model: Backbone, height: int | None = None) -> Tensor:
    _, trained, width = model.sample_shape
    shape = (2, 1, height or trained, width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    cond = Conditioning(labels=torch.tensor([0, 2]))
    return model(x, torch.tensor([0.3, 0.9]), cond).sample


def factors_of(model: nn.Module) -> list[SkipScale]:
    return [module for module in model.modules() if isinstance(module, SkipScale)]


def test_none_is_the_model_as_it_was(make: Callable[..., Any]) -> None:
    plain, ones = make(), make(skip_scale="geometric", skip_kappa=1.0)
    assert plain.config["skip_scale"] == "none"
    assert not [name for name in plain.state_dict() if "skip_factors" in name]
    assert plain.state_dict().keys() == ones.state_dict().keys()
    assert torch.equal(predict(ones), predict(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_the_prediction_and_can_be_saved(
    make: Callable[..., Any], kind: str, tmp_path: Any
) -> None:
    model = make(skip_scale=kind)
    changed = not torch.equal(predict(model), predict(make()))
    assert changed is (kind != "channel")  # whose factors start at 1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config["skip_scale"] == kind
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # weights read from a file lie at other addresses, where products may round otherwise
    torch.testing.assert_close(predict(again), predict(model))


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("constant", [[0.5**0.5] * 2, [0.5**0.5]]),
        # the deepest skip of a branch has the smallest factor, each branch counting its own
        ("geometric", [[0.7, 1.0], [1.0]]),
    ],
)
def test_dimr_scales_the_half_of_a_join_that_reads_the_skip(
    kind: Any, factors: list[list[float]]
) -> None:
    scaled, folded = dimr(skip_scale=kind, skip_kappa=0.7), dimr()
    _fold(folded, factors)
    torch.testing.assert_close(predict(scaled), predict(folded))


def _fold(model: DiMR, factors: list[list[float]]) -> None:
    """Multiply the columns of the joins that read skips; the first half reads the stream."""
    with torch.no_grad():
        for branch, own in zip(model.stages, factors, strict=True):
            for join, factor in zip(branch.skips, own, strict=True):
                join.weight[:, join.weight.shape[1] // 2 :] *= factor


def test_dimr_has_kinds_and_kappas_of_each_branch() -> None:
    model = dimr(skip_scale=["geometric", "channel"], skip_kappa=[0.25, 0.5])
    coarse, fine = factors_of(model)
    assert coarse.factors == [0.25, 1.0]
    assert isinstance(fine.channels, nn.Parameter)
    assert fine.channels.shape == (1, 8)
    with torch.no_grad():
        fine.channels.fill_(0.5)
    folded = dimr()
    _fold(folded, [[0.25, 1.0], [0.5]])
    torch.testing.assert_close(predict(model), predict(folded))


def test_lamamba_adds_what_is_left_of_a_skip() -> None:
    model = lamamba(skip_scale="geometric", skip_kappa=0.5)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = output
            seen[name + " in"] = inputs[0]

        return hook

    for name in ("encoder", "decoder", "upsamples"):
        for i, module in enumerate(getattr(model, name)):
            module.register_forward_hook(keep(f"{name}.{i}"))
    model.middle.register_forward_hook(keep("middle"))
    predict(model)
    before = [
        seen["middle in"] + seen["middle"],
        seen["decoder.0"],
        seen["upsamples.0"],
        seen["upsamples.1"],
    ]
    for i, factor in enumerate((0.125, 0.25, 0.5, 1.0)):  # the outermost is whole
        expected = before[i] + factor * seen[f"encoder.{3 - i}"]
        torch.testing.assert_close(seen[f"decoder.{i} in"], expected)


def test_gates_count_the_tokens_of_their_skip() -> None:
    # a class token and 4 x 4 cells; 8 x 8 cells
    gates = [factor.gates for factor in factors_of(dimr(skip_scale="gate"))]
    assert [[gate.num_tokens for gate in own] for own in gates] == [[17, 17], [64]]
    (factors,) = factors_of(lamamba(skip_scale="gate"))
    assert [gate.num_tokens for gate in factors.gates] == [16, 16, 64, 256]
    # one gate for all skips of one grid
    (shared,) = factors_of(lamamba(skip_scale="gate_shared"))
    assert [gate.num_tokens for gate in shared.gates] == [16, 64, 256]
    assert [shared.gate_of[j] for j in range(4)] == [0, 0, 1, 2]
    (channels,) = factors_of(lamamba(skip_scale="channel"))
    assert [len(factor) for factor in channels.channels] == [32, 32, 16, 8]


@pytest.mark.parametrize("kind", ["gate", "gate_shared"])
def test_gates_halve_what_they_cannot_tell_apart(make: Callable[..., Any], kind: Any) -> None:
    gated = make(skip_scale=kind)
    with torch.no_grad():
        for module in gated.modules():
            if isinstance(module, TokenGate):
                for parameter in module.linear_2.parameters():
                    parameter.zero_()
    halved = make(skip_scale="constant")
    for factor in factors_of(halved):
        factor.factors = [0.5] * len(factor.factors)
    torch.testing.assert_close(predict(gated), predict(halved))


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_models_start_near_their_law(make: Callable[..., Any], kind: Any) -> None:
    model = make(skip_scale=kind)
    model.reset_parameters()
    for factor in factors_of(model):
        for gate in factor.gates or ():
            # torch's own law, not that of the backbone's linear layers
            bound = gate.num_tokens**-0.5
            assert 0.5 * bound < float(gate.linear_1.weight.detach().abs().max()) <= bound
        for channels in factor.channels if factor.channels is not None else ():
            assert bool((channels == 1).all())


@pytest.mark.parametrize("kind", ["gate", "gate_shared"])
def test_gates_keep_to_the_trained_resolution(make: Callable[..., Any], kind: Any) -> None:
    model = make(skip_scale=kind)
    height = 2 * model.sample_shape[1]
    with pytest.raises(ValueError, match=r"gate of the skips was built for 1[67] tokens"):
        predict(model, height)
    for free in ("none", "constant", "geometric", "channel"):
        assert predict(make(skip_scale=free), height).shape[2] == height


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"skip_scale": "gates"}, r"model\.skip_scale must be one of .*Did you mean 'gate'\?"),
        ({"skip_kappa": 1.5}, r"model\.skip_kappa must lie in \(0, 1\], but is 1\.5"),
        ({"skip_scale": "gate", "patch_size": 4}, "gate needs 16 tokens at least, .* has 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        lamamba(**changes)
    if "patch_size" in changes:
        changes = {"skip_scale": "gate", "patch_sizes": [4, 2]}
        sentence = "gate needs 16 tokens at least, .* has 5"
    with pytest.raises(ConfigError, match=sentence):
        dimr(**changes)


def test_one_entry_a_branch() -> None:
    with pytest.raises(ConfigError, match=r"model\.skip_kappa has 3 entries but .* has 2"):
        dimr(skip_scale="geometric", skip_kappa=[0.5, 0.6, 0.7])


def test_official_layouts_know_no_scaled_skips() -> None:
    for model, files in ((dimr(), dimr_files), (lamamba(), lamamba_files)):
        state = files.to_official(model.state_dict(), model.config)
        scaled = type(model)(**{**_arguments(model), "skip_scale": "constant"})
        with pytest.raises(CheckpointError, match="has skip_scale=constant, which the official"):
            files.to_official(scaled.state_dict(), scaled.config)
        with pytest.raises(CheckpointError, match="has skip_scale=constant, which the official"):
            files.from_official(state, scaled)
    with pytest.raises(CheckpointError, match=r"skip_scale=.'none', 'gate'."):
        refuse_scaled_skips({"skip_scale": ["none", "gate"]}, family="DiMR")


def _arguments(model: Backbone) -> dict[str, Any]:
    return {name: value for name, value in model.config.items() if name[0] != "_"}
