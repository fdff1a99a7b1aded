"""Switti: published sizes, the contract of scale-wise networks, each part against its meaning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor

from genscale.backbones.base import parameter_count
from genscale.backbones.scale_wise import attend_by_scale
from genscale.backbones.switti import Switti, crop_numbers
from genscale.backbones.switti_block import Condition, NormedScaleAttention, SwittiBlock
from genscale.cli.building import instantiate
from genscale.cli.resolvers import register_resolvers
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.guidance.scale_wise import ScaleGuidance
from genscale.layers.mlp import MLP
from genscale.layers.scale_rope import ScaleRoPE
from genscale.objectives.memory import cat_tensors, take_rows
from genscale.objectives.scale_view import ScaleView

CONF = Path(__file__).resolve().parents[2] / "conf"
TINY: dict[str, Any] = {
    "scales": [1, 2, [2, 3]],
    "latent_channels": 3,
    "vocab_size": 11,
    "text_size": 12,
    "num_text_tokens": 4,
    "pooled_text_size": 10,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
}
TOKENS = 1 + 4 + 6
VARIANTS: dict[str, dict[str, Any]] = {
    "own scale only": {},
    "autoregressive": {"use_ar": True},
    "learned places": {"rope": False, "use_ar": True},
    "gelu, no crop": {"mlp": "gelu", "crop_condition": False},
    "first scale of four": {"scales": [2, 3], "use_ar": True},
    "recomputed": {"checkpoint_blocks": True},
}


def build(seed: int = 0, **changes: Any) -> Switti:
    """A tiny model whose weights are all random, so that nothing is at its silent start."""
    torch.manual_seed(seed)
    model: Switti = Switti(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        if model.crop_frequencies is not None:
            model.crop_frequencies.mul_(0.01)  # phases that float32 holds well
    return model.eval()


def inputs(model: Switti, size: int = 3) -> tuple[Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    tokens = model.embed.spans[-1][1]
    features = torch.randn(size, tokens, 3, generator=generator)
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 3])[:size, None]
    cond = Conditioning(
        text=torch.randn(size, 5, 12, generator=generator),
        text_mask=mask,
        pooled_text=torch.randn(size, 10, generator=generator),
        size=torch.tensor([[600, 800], [512, 1024], [512, 512]])[:size],
    )
    return features, cond


def walk(model: Switti, features: Tensor, cond: Conditioning) -> tuple[Tensor, list[Any]]:
    """Go scale by scale; return all logits, and the memory after every scale."""
    memory: Any = model.begin(cond, len(features), features.device)
    parts, memories = [], []
    for k, (start, end) in enumerate(model.embed.spans):
        out = model(features[:, start:end], cond, range(k, k + 1), memory)
        memory = out.memory
        parts.append(out.logits)
        memories.append(memory)
    return torch.cat(parts, dim=1), memories


def on_meta(**arguments: Any) -> Switti:
    with torch.device("meta"):
        return Switti(**arguments)


# published sizes


# millions of parameters with and without crop conditioning: the closed form of the official class
@pytest.mark.parametrize(
    ("depth", "with_crop", "without"), [(30, 2470.5, 2466.8), (20, 772.6, None), (16, 411.7, None)]
)
def test_published_sizes(depth: int, with_crop: float, without: float | None) -> None:
    size = {"depth": depth, "hidden_size": 64 * depth, "num_heads": depth}
    assert parameter_count(on_meta(**size)) / 1e6 == pytest.approx(with_crop, abs=0.05)
    if without is not None:
        model = on_meta(**size, crop_condition=False)
        assert parameter_count(model) / 1e6 == pytest.approx(without, abs=0.05)


@pytest.mark.parametrize(
    ("name", "use_ar", "tokens"),
    [
        ("switti_512", False, 2240),
        ("switti_512_ar", True, 2240),
        ("switti_1024", False, 9451),
        ("switti_1024_ar", True, 9451),
    ],
)
def test_published_configs(name: str, use_ar: bool, tokens: int) -> None:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"model={name}"])
    with torch.device("meta"):
        model = instantiate(cfg.model, "model")
    assert parameter_count(model) / 1e6 == pytest.approx(2470.5, abs=0.05)
    assert model.needs_prefix is use_ar
    assert model.embed.spans[-1][1] == tokens
    assert (cfg.text_encoder.token_size, cfg.text_encoder.pooled_size) == (2048, 1280)
    assert model.config["num_text_tokens"] == 77


def test_operations_of_self_attention() -> None:
    # at 512 pixels 0.75 T among all scales before, 0.35 T within scales, in 30 blocks
    more = on_meta(use_ar=True, depth=3).flops() - on_meta(depth=3).flops()
    assert 10 * more / 1e12 == pytest.approx(0.75 - 0.35, abs=0.01)


# the contract


@pytest.mark.parametrize("name", VARIANTS)
def test_scale_by_scale_gives_the_numbers_of_teacher_forcing(name: str) -> None:
    model = build(**VARIANTS[name])
    features, cond = inputs(model)
    taught = model(features, cond).logits
    stepped, _ = walk(model, features, cond)
    assert taught.shape == (3, model.embed.spans[-1][1], 11)
    assert taught.dtype == torch.float32
    assert taught.std() > 0.1  # there is something to compare
    torch.testing.assert_close(stepped, taught, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_ar", [False, True])
def test_a_sample_does_not_depend_on_its_batch(use_ar: bool) -> None:
    model = build(use_ar=use_ar)
    features, cond = inputs(model)
    together, _ = walk(model, features, cond)
    for i in range(3):
        alone, _ = walk(model, features[i : i + 1], cond.select(torch.tensor([i])))
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_ar", [False, True])
def test_memory_follows_its_rows(use_ar: bool) -> None:
    model = build(use_ar=use_ar)
    features, cond = inputs(model)
    together, _ = walk(model, features, cond)
    (start, end), last = model.embed.spans[2], range(2, 3)
    # a new walk up to the last scale, whose rows are then taken in another order, and joined
    memory = walk_to(model, features, cond, 2)
    order = torch.tensor([2, 0, 0])
    picked = model(features[order, start:end], cond, last, take_rows(memory, order)).logits
    torch.testing.assert_close(picked, together[order, start:end], atol=1e-5, rtol=1e-5)
    joined = cat_tensors([take_rows(memory, torch.tensor([i])) for i in (1, 2)])
    picked = model(features[1:, start:end], cond, last, joined).logits
    torch.testing.assert_close(picked, together[1:, start:end], atol=1e-5, rtol=1e-5)


def walk_to(model: Switti, features: Tensor, cond: Conditioning, stop: int) -> Any:
    memory: Any = model.begin(cond, len(features), features.device)
    for k, (start, end) in enumerate(model.embed.spans[:stop]):
        memory = model(features[:, start:end], cond, range(k, k + 1), memory).memory
    return memory


def test_branches_of_one_memory_do_not_disturb_each_other() -> None:
    model = build(use_ar=True)
    features, cond = inputs(model)
    memory = walk_to(model, features, cond, 1)
    (start, middle), end = model.embed.spans[1], model.embed.spans[2][1]
    outputs = []
    for factor in (1.0, -1.0):  # both go on from scale 0
        out = model(factor * features[:, start:middle], cond, range(1, 2), memory)
        outputs.append((factor, out.memory))
    for factor, after in outputs:
        own = torch.cat((features[:, :start], factor * features[:, start:middle]), dim=1)
        own = torch.cat((own, features[:, middle:]), dim=1)
        got = model(features[:, middle:end], cond, range(2, 3), after).logits
        torch.testing.assert_close(got, model(own, cond).logits[:, middle:], atol=1e-5, rtol=1e-5)


def test_only_autoregressive_models_keep_keys_and_need_what_came_before() -> None:
    lone, causal = build(), build(use_ar=True)
    _, cond = inputs(lone)
    device = torch.device("cpu")
    assert (lone.needs_prefix, causal.needs_prefix) == (False, True)
    assert "cache" not in lone.begin(cond, 3, device)
    assert causal.begin(cond, 3, device)["cache"]["keys"][0].shape == (3, 2, TOKENS, 8)


@pytest.mark.parametrize("use_ar", [False, True])
def test_which_scales_a_scale_sees(use_ar: bool) -> None:
    model = build(use_ar=use_ar)
    features, cond = inputs(model)
    features.requires_grad_()
    for start, end in model.embed.spans:
        logits = model(features, cond).logits[:, start:end]
        (grad,) = torch.autograd.grad(logits.square().sum(), features)
        seen = grad.abs().sum(dim=(0, 2)) > 0
        first = 1 if use_ar else max(start, 1)  # rows of scale 0 are not read
        assert seen.tolist() == [first <= i < end for i in range(TOKENS)]


def test_teacher_forcing_of_fewer_scales_is_the_beginning_of_that_of_all() -> None:
    model = build(use_ar=True)
    features, cond = inputs(model)
    whole = model(features, cond).logits
    torch.testing.assert_close(
        model(features[:, :5], cond).logits, whole[:, :5], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("use_ar", [False, True])
def test_guidance_that_ends_drops_the_null_half(use_ar: bool) -> None:
    model = build(use_ar=use_ar)
    features, cond = inputs(model)
    generator = torch.Generator().manual_seed(3)
    negative = replace(
        inputs(model)[1], pooled_text=torch.randn(3, 10, generator=generator), size=None
    )
    cond = replace(cond, negative=negative)
    view = ScaleGuidance(4.0, stop=2).wrap(ScaleView(model, tokenizer_of(model)))
    wanted, unwanted = model(features, cond).logits, model(features, cond.null()).logits
    memory: Any = None
    for k, (start, end) in enumerate(model.embed.spans):
        prediction = view(features[:, start:end], k, cond, memory)
        memory = prediction.memory
        weight = 1.0 if k == 2 else 1.0 + 3.0 * k / 2
        expected = (weight * wanted - (weight - 1.0) * unwanted)[:, start:end]
        torch.testing.assert_close(prediction.logits, expected, atol=1e-4, rtol=1e-4)
        assert prediction.cost.tolist() == [1.0 if k == 2 else 2.0] * 3


def tokenizer_of(model: Switti) -> Any:
    class Stand:
        """As much of a tokenizer as a view looks at."""

        scales, vocab_size = model.scales, model.vocab_size

        def add_scale(self) -> None: ...

    return Stand()


def test_recomputed_blocks_have_the_same_gradients() -> None:
    grads = []
    for recomputed in (False, True):
        model = build(checkpoint_blocks=recomputed)
        model(*inputs(model)).logits.square().mean().backward()
        grads.append({name: value.grad for name, value in model.named_parameters()})
    assert all(value is not None for value in grads[0].values())  # every parameter is learned
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


def test_half_precision_stays_close() -> None:
    model = build(use_ar=True)
    features, cond = inputs(model)
    whole = model(features, cond).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        taught = model(features, cond).logits
        stepped, memories = walk(model, features, cond)
    assert memories[-1]["cache"]["keys"][0].dtype == torch.bfloat16
    for half in (taught, stepped):
        assert half.dtype == torch.float32
        assert 0 < (half - whole).square().mean().sqrt() < 0.05 * whole.std()


def test_saved_and_loaded_models_are_equal(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    again = Switti.from_pretrained(tmp_path)
    assert again.config["scales"] == [1, 2, [2, 3]]
    assert torch.equal(again.crop_frequencies, model.crop_frequencies)
    assert torch.equal(again(*inputs(model)).logits, model(*inputs(model)).logits)


# what it reads


def test_text_that_is_masked_out_is_not_read() -> None:
    model = build()
    features, cond = inputs(model)
    assert cond.text is not None
    assert cond.text_mask is not None
    noise = torch.randn_like(cond.text).masked_fill(cond.text_mask[..., None], 0.0)
    other = replace(cond, text=cond.text + noise)
    assert torch.equal(model(features, other).logits, model(features, cond).logits)
    heard = replace(cond, text=cond.text + 1.0)
    assert not torch.allclose(model(features, heard).logits, model(features, cond).logits)


def test_no_text_is_the_text_of_a_dropped_condition() -> None:
    model = build()
    features, cond = inputs(model)
    bare = Conditioning(size=cond.size)
    torch.testing.assert_close(model(features, bare).logits, model(features, cond.null()).logits)


def test_no_size_is_the_size_of_what_was_seen() -> None:
    model = build()
    features, cond = inputs(model)
    same = model(features, replace(cond, size=torch.full((3, 2), 512))).logits
    assert torch.equal(model(features, replace(cond, size=None)).logits, same)
    assert not torch.allclose(model(features, cond).logits[:2], same[:2])


def test_crops() -> None:
    size = torch.tensor([[600, 800], [512, 512], [1000, 400], [511, 1023]])
    numbers = [[512, 682, 0, 85], [512, 512, 0, 0], [1280, 512, 384, 0], [512, 1025, 0, 256]]
    assert crop_numbers(size).tolist() == numbers
    # the official rounding, in float32, leaves about one short side in seven at 511
    sides = torch.arange(64, 2048)
    square = torch.stack((sides, sides), dim=1)
    assert crop_numbers(square).unique().tolist() == [0, 512]
    short = crop_numbers(square, single=True)[:, 0]
    assert short.unique().tolist() == [511, 512]
    assert (short == 511).float().mean() == pytest.approx(0.14, abs=0.02)


def test_the_switch_of_parity_changes_crops_alone() -> None:
    sides = torch.arange(64, 2048)
    wrong = crop_numbers(torch.stack((sides, sides), dim=1), single=True)[:, 0] == 511
    odd = int(sides[wrong][0])
    features, cond = inputs(build())
    for size, equal in ((torch.full((3, 2), odd), False), (torch.full((3, 2), 512), True)):
        sized = replace(cond, size=size)
        pair = [build(float32_crop=single)(features, sized).logits for single in (False, True)]
        assert torch.equal(*pair) is equal


# its parts


def test_attention_is_softmax_over_one_scale_of_normalised_turned_queries_and_keys() -> None:
    torch.manual_seed(0)
    layer = NormedScaleAttention(16, 2, prefix=False)
    x, scales = torch.randn(2, 10, 16), ((2, 2), (2, 3))
    rotation = ScaleRoPE(8).rotation(scales, torch.device("cpu"))
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in normed(layer.qkv(x)))
    turns = torch.polar(torch.ones(10, 4), torch.atan2(rotation[1], rotation[0]))
    q, k = (
        torch.view_as_real(
            torch.view_as_complex(part.unflatten(-1, (4, 2)).contiguous()) * turns
        ).flatten(-2)
        for part in (q, k)
    )
    level = torch.tensor([0] * 4 + [1] * 6)
    logits = (q @ k.mT / 8**0.5).masked_fill(level[:, None] != level, -torch.inf)
    expected = layer.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    got = layer(x, [(0, 4), (4, 10)], rotation)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    plain = attend_by_scale(q, k, v, [(0, 4), (4, 10)], prefix=False)
    torch.testing.assert_close(layer.out(plain.transpose(1, 2).flatten(2)), got)


def normed(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise queries and keys over all heads together."""
    q, k, v = qkv.chunk(3, dim=-1)
    return F.layer_norm(q, (16,), eps=1e-6), F.layer_norm(k, (16,), eps=1e-6), v


def test_a_block_is_its_equations() -> None:
    model = build(depth=1)
    (block,) = model.blocks
    assert isinstance(block, SwittiBlock)
    _, cond = inputs(model)
    assert cond.text is not None
    x, vector, crop = torch.randn(3, 4, 16), torch.randn(3, 16), torch.randn(3, 16)
    spans, rotation = [(0, 4)], ScaleRoPE(8).rotation(((2, 2),), torch.device("cpu"))
    condition = Condition(vector, crop, cond.text, cond.text_mask)
    c = block.modulation(F.silu(vector + block.crop_scale * crop))[:, None]
    gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = c.chunk(6, dim=-1)
    y = block.attention(block.attention_norm_in(x) * (1 + scale_1) + shift_1, spans, rotation)
    expected = x + gate_1 * block.attention_norm_out(y)
    kv = block.cross_attention.project(block.text_norm(cond.text))
    y = block.cross_attention(block.cross_norm_in(expected), kv, cond.text_mask)
    expected = expected + block.cross_norm_out(y)
    y = block.mlp(block.mlp_norm_in(expected) * (1 + scale_2) + shift_2)
    expected = expected + gate_2 * block.mlp_norm_out(y)
    torch.testing.assert_close(block(x, condition, spans, rotation), expected)


def test_how_weights_start() -> None:
    torch.manual_seed(0)
    model: Switti = Switti(**{**TINY, "hidden_size": 128, "depth": 2})
    std = (1 / (3 * 128)) ** 0.5
    block = model.blocks[0]
    assert isinstance(block, SwittiBlock)
    in_units = {
        "gates": (block.modulation.weight[:256], 1e-5),
        "scales and shifts": (block.modulation.weight[256:], 0.5),
        "queries": (block.attention.qkv.weight, 1.0),
        "last of attention": (block.attention.out.weight, 0.5),  # 1 / sqrt(2 depth)
        "last of cross-attention": (block.cross_attention.out.weight, 0.5),
        "last of SwiGLU": (block.mlp.down.weight, 1.0),
        "head": (model.head.out.weight, 0.02),
    }
    for weight, factor in in_units.values():
        assert weight.std().item() == pytest.approx(factor * std, rel=0.05)
    assert block.crop_scale is not None
    assert not block.crop_scale.any()
    plain = Switti(**{**TINY, "hidden_size": 128, "mlp": "gelu"}).blocks[0]
    assert isinstance(plain, SwittiBlock)
    assert isinstance(plain.mlp, MLP)
    assert plain.mlp.down.weight.std().item() == pytest.approx(0.5 * std, rel=0.05)


def test_only_matrices_decay() -> None:
    model = build(rope=False)
    spared = model.no_weight_decay()
    shapes = {name: value.dim() for name, value in model.named_parameters()}
    assert {"embed.start", "embed.places", "embed.level.weight"} <= spared
    assert all(name in spared for name, dim in shapes.items() if dim < 2)
    assert not any(
        name in spared for name in shapes if name.endswith(("qkv.weight", "down.weight"))
    )


# errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 3}, "num_heads=3 heads do not divide"),
        ({"hidden_size": 12, "crop_condition": False}, "heads of a multiple of 4 channels"),
        ({"hidden_size": 12, "num_heads": 1}, "hidden_size to be a multiple of 8"),
        ({"mlp": "swigul"}, "Did you mean 'swiglu'"),
        ({"scales": [2, 1]}, "must grow from coarse to fine"),
        ({"text_size": 0}, "text_size must be an integer of at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Switti(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": torch.zeros(3, 5, 7)}, r"cond.text of shape \(3, M, 12\), but it has shape"),
        ({"pooled_text": None}, "cond.pooled_text of shape .* but it is missing"),
    ],
)
def test_texts_of_other_encoders_are_refused(changes: dict[str, Any], words: str) -> None:
    model = build()
    features, cond = inputs(model)
    with pytest.raises(ValueError, match=words):
        model(features, replace(cond, **changes))


def test_scales_out_of_order_are_refused() -> None:
    model = build(use_ar=True)
    features, cond = inputs(model)
    memory = model.begin(cond, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="Go through the scales in order"):
        model(features[:, 1:5], cond, range(1, 2), memory)
