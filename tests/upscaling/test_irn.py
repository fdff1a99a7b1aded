"""IRN: a bijection whose backward pass keeps nothing, and whose determinant is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import CheckpointError, ConfigError, DataError
from genscale.io.converters.irn import config_from_official
from genscale.upscaling.irn import IRN
from genscale.upscaling.irn_blocks import (
    ConvDownsampling,
    DenseBlock,
    HaarDownsampling,
    InvBlock,
    Invertible,
    InvertibleChain,
    Rebuilt,
    run_chain,
)
from genscale.upscaling.rescaling_losses import quantise

KINDS = {
    "haar x2": {"scale": 2, "num_blocks": [2]},
    "haar x4": {"scale": 4, "num_blocks": [1, 2]},
    "haar x4, halved first": {"scale": 4, "num_blocks": [2], "down_first": True},
    "learnt x3": {"scale": 3, "num_blocks": [2], "downsampling": "conv"},
    "grey x2": {"scale": 2, "num_blocks": [2], "small_channels": 1},
}
DUAL = {"scale": 2, "num_blocks": [2], "extra_latent_channels": 2}


def stirred(seed: int = 0, **settings: object) -> IRN:
    """Return a tiny model away from its start, where every block is the identity."""
    model: IRN = IRN(growth=4, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.02 if "conv_weights" in name else 0.1
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def pictures(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_downscaled_is_restored(kind: str) -> None:
    model = stirred(**KINDS[kind])
    x = pictures(2, 3, 12, 24)
    with torch.no_grad():
        y, z = model.downscale(x)
        back = model.restore(y, z)
    small = KINDS[kind].get("small_channels", 3)
    assert y.shape == (2, small, 12 // model.scale, 24 // model.scale)
    assert tuple(z.shape[1:]) == model.latent_shape(y)
    # a learnt matrix that starts with the mean of 9 pixels in place of one amplifies rounding
    assert (back - x).abs().max() < (1e-4 if "learnt" in kind else 1e-5)


def test_a_second_latent_comes_back_as_the_zeros_it_was() -> None:
    model = stirred(**DUAL)
    x = pictures(2, 3, 8, 12)
    with torch.no_grad():
        y, z = model.downscale(x)
        back, extra = model.invert(y, z)
        other, moved = model.invert(quantise(y), torch.zeros_like(z))
    assert y.shape == (2, 3, 4, 6)
    assert tuple(z.shape[1:]) == model.latent_shape(y) == (3 * 4 + 2 * 4 - 3, 4, 6)
    assert (back - x).abs().max() < 1e-5
    assert extra.abs().max() < 1e-5
    # what was lost shows there, and that is what training makes small
    assert moved.shape == (2, 2, 8, 12)
    assert moved.abs().max() > 1e-3
    assert torch.equal(other, model.restore(quantise(y), torch.zeros_like(z)))
    assert torch.equal(model(quantise(y), 2), other)


def test_without_a_second_latent_nothing_changes() -> None:
    plain, none = (
        stirred(**KINDS["haar x2"]),
        IRN(**DUAL | {"growth": 4, "extra_latent_channels": 0}),
    )
    none.load_state_dict(plain.state_dict())
    x = pictures(2, 3, 8, 8)
    assert torch.equal(plain.transform(x)[0], none.transform(x)[0])
    y, z = none.downscale(x)
    assert none.invert(y, z)[1].numel() == 0
    with pytest.raises(ConfigError, match="extra_latent_channels must be 0 or more"):
        IRN(scale=2, num_blocks=[1], extra_latent_channels=-1)


def test_a_new_model_averages_squares() -> None:
    x = pictures(1, 3, 8, 8)
    for settings in ({"scale": 4, "num_blocks": [1, 1]}, {**KINDS["learnt x3"], "scale": 4}):
        y, _ = IRN(growth=4, **settings).downscale(x)
        torch.testing.assert_close(y, F.avg_pool2d(x, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inverse", [False, True])
def test_the_log_determinant_is_that_of_the_jacobian(kind: str, inverse: bool) -> None:
    model = stirred(**KINDS[kind]).double()
    model.operations.reversible = False
    side = model.scale
    shape = (1, 3 * side**2, 1, 1) if inverse else (1, 3, side, side)
    x = pictures(*shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: model.transform(flat.view(shape), inverse)[0].flatten(), x.flatten()
    )
    expected = torch.linalg.slogdet(jacobian)[1]
    got = model.transform(x.expand(3, -1, -1, -1), inverse)[1]  # of one picture, not of the batch
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inverse", [False, True])
def test_rebuilt_activations_give_the_same_gradients(kind: str, inverse: bool) -> None:
    model = stirred(**KINDS[kind]).double()
    model.operations[-1].G.conv2.weight.requires_grad_(False)  # parts may be frozen
    s = model.scale
    x = pictures(2, *((3 * s * s, 3, 2) if inverse else (3, 3 * s, 2 * s)), dtype=torch.float64)
    results = []
    for reversible in (True, False):
        model.operations.reversible = reversible
        leaf = x.clone().requires_grad_()
        out, log_det = model.transform(leaf, inverse)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(out.pow(3).mean() + 0.1 * log_det, (leaf, *trained))
        results.append((out, log_det, *grads))
    for rebuilt, kept in zip(*results, strict=True):
        torch.testing.assert_close(rebuilt, kept, rtol=1e-9, atol=1e-12)


def test_layers_without_a_rule_of_their_own_rebuild_by_the_base_class() -> None:
    block = InvBlock(6, 3, growth=4).double()
    nn.init.normal_(block.F.conv5.weight, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(block.G.conv5.weight, generator=torch.Generator().manual_seed(1))
    x, grad = pictures(2, 6, 4, 4, dtype=torch.float64), pictures(2, 6, 4, 4, dtype=torch.float64)
    log_grad = torch.tensor(0.3, dtype=torch.float64)
    for inverse in (False, True):
        out = block(x, inverse)[0].detach()
        own: Rebuilt = block.rebuild(out, grad, log_grad, inverse)
        general = Invertible.rebuild(block, out, grad, log_grad, inverse)
        torch.testing.assert_close(own.value, x)
        torch.testing.assert_close(own.value, general.value)
        torch.testing.assert_close(own.grad, general.grad)
        for first, second in zip(own.parameters, general.parameters, strict=True):
            torch.testing.assert_close(first, second)


def saved_bytes(run: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Return the bytes of all tensors that a backward pass waits for, the weights left out."""
    weights = {parameter.data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(kept.values())


def test_memory_does_not_grow_with_depth() -> None:
    x = pictures(1, 3, 16, 16)
    found = {}
    for reversible in (True, False):
        for depth in (1, 6):
            model = IRN(scale=2, num_blocks=[depth], growth=4, reversible=reversible)
            found[reversible, depth] = saved_bytes(
                lambda model=model: model.transform(x)[0], list(model.parameters())
            )
    assert found[True, 6] == found[True, 1] == x.numel() * 4  # the output alone
    assert found[False, 6] > 4 * found[False, 1] > 4 * found[True, 1]


def test_weights_that_change_before_backward_are_refused() -> None:
    model = stirred(**KINDS["haar x2"])
    out = model.transform(pictures(1, 3, 4, 4))[0]
    with torch.no_grad():
        model.operations[1].F.conv1.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        torch.autograd.backward(out.sum())


def test_autocast_changes_nothing() -> None:
    model = stirred(**KINDS["haar x4"])
    x = pictures(1, 3, 8, 8)
    expected = model.transform(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model.transform(x)[0]
    assert torch.equal(got, expected)


def test_upscaling_takes_the_mean_of_the_latent() -> None:
    model = stirred(**KINDS["haar x4"]).eval()
    y = pictures(2, 3, 5, 6)
    with torch.no_grad():
        whole = model(y, 4)
        assert whole.shape == (2, 3, 20, 24)
        assert torch.equal(whole, model.restore(y, torch.zeros(2, *model.latent_shape(y))))
        assert model.upscale(y, 4, tile=4, overlap=2).shape == whole.shape


def test_sizes_are_those_of_the_official_networks() -> None:
    published = {(2, (8,)): 1_667_952, (4, (8, 8)): 4_355_136, (8, (8, 8, 8)): 11_119_248}
    for (scale, blocks), expected in published.items():
        with torch.device("meta"):
            model = IRN(scale=scale, num_blocks=blocks)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_official_settings_and_keys() -> None:
    official = {"channel_in": 3, "channel_out": 3, "block_num": [2, 9], "down_num": 2, "gc": 4}
    settings = config_from_official({**official, "down_first": True})
    assert settings["num_blocks"] == [2]  # further numbers are not read there either
    model = IRN(**settings)
    keys = set(model.state_dict())
    assert {"operations.0.haar_weights", "operations.1.haar_weights"} <= keys
    assert {"operations.2.F.conv1.weight", "operations.3.H.conv5.bias"} <= keys
    learnt = IRN(**config_from_official({**official, "use_ConvDownsampling": True}))
    assert learnt.state_dict()["operations.0.conv_weights"].shape == (16, 16)
    with pytest.raises(CheckpointError, match="'Resnet', but IRN here has dense blocks"):
        config_from_official({**official, "subnet": "Resnet"})


def test_a_saved_model_comes_back(tmp_path) -> None:
    model = stirred(**KINDS["learnt x3"])
    model.save_pretrained(tmp_path)
    again = IRN.from_pretrained(tmp_path)
    x = pictures(1, 3, 6, 6)
    assert torch.equal(again.transform(x)[0], model.transform(x)[0])


def test_weights_can_be_drawn_anew() -> None:
    model = stirred(**KINDS["haar x4"])
    model.operations[0].haar_weights.zero_()
    model.reset_parameters()
    x = pictures(1, 3, 8, 8)
    torch.testing.assert_close(model.downscale(x)[0], F.avg_pool2d(x, 4))
    assert model.operations[1].F.conv1.weight.std() > 0
    assert not model.operations[1].F.conv5.weight.any()


def test_chains_of_other_layers() -> None:
    layers = [HaarDownsampling(2), ConvDownsampling(2), InvBlock(32, 1, growth=2)]
    chain = InvertibleChain(layers)
    x = pictures(1, 2, 8, 8)
    y, log_det = chain(x)
    torch.testing.assert_close(y, run_chain(layers, x)[0])
    back, inverse = chain(y, inverse=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(log_det + inverse, torch.zeros(()))
    assert DenseBlock(2, 3, growth=4)(x).shape == (1, 3, 8, 8)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match="scale is 3, but downsampling=haar halves"):
        IRN(scale=3, num_blocks=[1])
    with pytest.raises(ConfigError, match=r"num_blocks=\[1\] has 1 entries, expected 2"):
        IRN(scale=4, num_blocks=[1])
    with pytest.raises(ConfigError, match="downsampling is 'pool'"):
        IRN(scale=4, num_blocks=[1], downsampling="pool")
    with pytest.raises(ConfigError, match="small_channels is 12, expected 1 to 11"):
        IRN(scale=2, num_blocks=[1], small_channels=12)
    with pytest.raises(ConfigError, match="cannot split off small_channels=20"):
        IRN(scale=4, num_blocks=[1, 1], small_channels=20)
    model = stirred(**KINDS["haar x4"])
    with pytest.raises(DataError, match="sides that 4 divides"):
        model.downscale(pictures(1, 3, 8, 6))
    with pytest.raises(DataError, match="latent of shape"):
        model.restore(pictures(1, 3, 2, 2), pictures(1, 44, 2, 2))
    with pytest.raises(ConfigError, match=r"upscaling\.scale=2 is not offered"):
        model(pictures(1, 3, 2, 2), 2)
    with pytest.raises(ConfigError, match="keep it in float32"):
        model.to(torch.bfloat16).downscale(pictures(1, 3, 8, 8))
