"""Entropy-keeping attention: the factor, and that hooks on queries are exact in every layer."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn

from genscale.backbones.causal_video import CausalVideo
from genscale.backbones.dit import DiT
from genscale.backbones.rin import RIN
from genscale.backbones.scale_wise import attend_by_scale
from genscale.backbones.uvit import UViT
from genscale.backbones.var import VAR
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.attention import SelfAttention
from genscale.layers.rope import axial_positions, rotate
from genscale.layers.scales import scale_spans
from genscale.resolution import EntropyAttention, apply_resolution
from genscale.resolution.entropy import ResolutionState, attention_entropy, entropy_factor


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Holder(nn.Module):
    """A network of one attention layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None):
        return self.layer(hidden_states, encoder_hidden_states=encoder_hidden_states)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_factor_is_the_root_of_the_logarithm_of_n_to_the_base_t() -> None:
    assert entropy_factor(1024, 64) == pytest.approx(math.sqrt(10 / 6))
    assert entropy_factor(64, 1024) == pytest.approx(math.sqrt(6 / 10))
    assert entropy_factor(64, 64) == 1.0
    assert entropy_factor(16, 1) == entropy_factor(1, 16) == 1.0


def test_the_factor_keeps_the_entropy_relative_to_a_nearly_flat_row() -> None:
    # uniform attention over M keys has entropy log M
    flat = attention_entropy(torch.zeros(1, 3, 4), torch.zeros(1, 7, 4))
    torch.testing.assert_close(flat, torch.full((1, 3), math.log(7)))
    # for normal logits of variance s^2, H = log N - s^2 / 2 to second order: that of 64 keys
    # comes nearer for 1024 keys with lam than without
    q, small, large = sample(1, 256, 16), sample(1, 64, 16, seed=1), sample(1, 1024, 16, seed=2)
    trained = attention_entropy(q, small).mean()
    plain = attention_entropy(q, large).mean()
    kept = attention_entropy(q, large, entropy_factor(1024, 64)).mean()
    assert abs(kept - trained) < abs(plain - trained)


def test_tokens_that_are_no_part_of_the_picture_count_in_both_numbers() -> None:
    state = ResolutionState(shrink=80 / 192)
    assert state.factor(208, 16) == pytest.approx(entropy_factor(208, 96))
    state.image_tokens = 192  # a layer on the joined sequence
    assert state.factor(208) == pytest.approx(entropy_factor(208, 96))


def test_changing_the_scale_of_an_attention_layer_changes_nothing() -> None:
    layer, x = Attention(query_dim=16, heads=2, dim_head=8), sample(2, 64, 16)
    plain = layer(x)
    layer.scale *= entropy_factor(64, 16)
    assert torch.equal(layer(x), plain)  # the processor in use never reads it
    layer.set_processor(AttnProcessor())  # the one that computes the softmax in full does
    scaled = layer(x)
    layer.scale = 8**-0.5
    assert not torch.allclose(scaled, plain, atol=1e-4)
    layer.set_processor(AttnProcessor2_0())
    with apply_resolution(Holder(layer), native=(4, 4), target=(8, 8)):
        torch.testing.assert_close(layer(x), scaled, atol=1e-6, rtol=0)


@pytest.mark.parametrize("qk_norm", [None, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_hook_is_the_logits_factor_to_1e_6(qk_norm: str | None, fused: bool) -> None:
    layer = Attention(query_dim=16, heads=2, dim_head=8, qk_norm=qk_norm)
    model, x = Holder(layer), sample(2, 64, 16)
    plain = model(x)
    factor = entropy_factor(64, 16)
    q, k, v = (
        proj(x).unflatten(-1, (2, 8)).transpose(1, 2)
        for proj in (layer.to_q, layer.to_k, layer.to_v)
    )
    if qk_norm is not None:
        q, k = layer.norm_q(q), layer.norm_k(k)
    y = torch.softmax(q @ k.transpose(-1, -2) * (factor / math.sqrt(8)), dim=-1) @ v
    expected = layer.to_out[0](y.transpose(1, 2).flatten(2))
    if fused:
        layer.fuse_projections()
    with apply_resolution(model, native=(4, 4), target=(8, 8)):
        got = model(x)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(x), plain, atol=0, rtol=0)


def test_attention_to_words_is_left_as_it_is() -> None:
    layer = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8)
    model, x, words = Holder(layer), sample(2, 64, 16), sample(2, 5, 12)
    plain = model(x, words)
    with apply_resolution(model, native=(4, 4), target=(8, 8)):
        assert torch.equal(model(x, words), plain)


@pytest.mark.parametrize("fused", [False, True])
def test_joint_attention_scales_both_queries_and_counts_words(fused: bool) -> None:
    layer = Attention(
        query_dim=16,
        added_kv_proj_dim=16,
        heads=2,
        dim_head=8,
        context_pre_only=False,
        processor=JointAttnProcessor2_0(),
    )
    model, x, words = Holder(layer), sample(2, 64, 16), sample(2, 5, 16, seed=1)
    q = torch.cat((layer.to_q(x), layer.add_q_proj(words)), dim=1)
    k = torch.cat((layer.to_k(x), layer.add_k_proj(words)), dim=1)
    v = torch.cat((layer.to_v(x), layer.add_v_proj(words)), dim=1)
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, scale=entropy_factor(69, 21) / math.sqrt(8))
    y = y.transpose(1, 2).flatten(2)
    if fused:
        layer.fuse_projections()
    with apply_resolution(model, native=(4, 4), target=(8, 8)):
        image, text = model(x, words)
    torch.testing.assert_close(image, layer.to_out[0](y[:, :64]), atol=1e-6, rtol=0)
    torch.testing.assert_close(text, layer.to_add_out(y[:, 64:]), atol=1e-6, rtol=0)


def test_layers_of_one_joined_sequence_count_its_words_too() -> None:
    class Flux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.single = FluxAttention(16, 2, 8, pre_only=True, processor=FluxAttnProcessor())

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return self.single(torch.cat((encoder_hidden_states, hidden_states), dim=1))

    model, x, words = Flux(), sample(1, 64, 16), sample(1, 5, 16, seed=1)
    layer, seen = model.single, torch.cat((words, x), dim=1)
    q, k, v = (
        proj(seen).unflatten(-1, (2, 8)).transpose(1, 2)
        for proj in (layer.to_q, layer.to_k, layer.to_v)
    )
    scale = entropy_factor(69, 21) / math.sqrt(8)
    y = F.scaled_dot_product_attention(layer.norm_q(q), layer.norm_k(k), v, scale=scale)
    with apply_resolution(model, native=(4, 4), target=(8, 8)):
        got = model(hidden_states=x, encoder_hidden_states=words)
    torch.testing.assert_close(got, y.transpose(1, 2).flatten(2), atol=1e-6, rtol=0)


def tiny_dit(**settings: object) -> DiT:
    torch.manual_seed(0)
    model = DiT(
        input_size=4, in_channels=3, num_classes=0, patch_size=1, hidden_size=16, depth=2,
        num_heads=2, **settings,
    ).eval()  # fmt: skip
    for parameter in model.parameters():  # zero-initialised gates would hide attention
        nn.init.normal_(parameter, std=0.3)
    return model


def attend_with(layer: SelfAttention, x: Tensor, factor: float) -> Tensor:
    q, k, v = (
        part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for part in layer.qkv(x).chunk(3, dim=-1)
    )
    scale = factor / math.sqrt(q.shape[-1])
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return layer.out(y.transpose(1, 2).flatten(2))


def test_a_backbone_follows_the_size_of_every_input() -> None:
    model = tiny_dit()
    layer = model.blocks[0].attention
    seen: list[tuple[Tensor, Tensor]] = []
    watch = layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    t = torch.zeros(1)
    with torch.no_grad():
        plain = model(sample(1, 3, 4, 4), t, Conditioning()).sample
        with apply_resolution(model, "entropy", target=(8, 8)):
            model(sample(1, 3, 8, 8), t, Conditioning())
            model(sample(1, 3, 4, 6), t, Conditioning())
            native = model(sample(1, 3, 4, 4), t, Conditioning()).sample
        watch.remove()
        assert torch.equal(native, plain)  # the trained size is not touched
        for (x, out), tokens in zip(seen[1:3], (64, 24), strict=True):
            expected = attend_with(layer, x, entropy_factor(tokens, 16))
            torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


def test_class_and_text_tokens_of_a_u_vit_count_in_both_numbers() -> None:
    model = UViT(
        input_size=4, in_channels=3, num_classes=5, patch_size=2, hidden_size=16, depth=3,
        num_heads=2,
    ).eval()  # fmt: skip
    layer, seen = next(m for m in model.modules() if isinstance(m, SelfAttention)), []
    with torch.no_grad(), apply_resolution(model, target=(8, 8)):
        layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
        cond = Conditioning(labels=torch.zeros(1, dtype=torch.int64))
        model(sample(1, 3, 8, 8), torch.zeros(1), cond)
    x, out = seen[0]
    assert x.shape[1] == 18  # time, class and 16 patches; 4 patches in training
    torch.testing.assert_close(out, attend_with(layer, x, entropy_factor(18, 6)))


def test_one_norm_of_queries_and_keys_gets_the_root_on_either() -> None:
    layer = SelfAttention(16, 2, axial_rope=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, positions)

    positions, x = axial_positions(8, 8), sample(1, 64, 16)
    assert layer.qk_norm is not None
    assert layer.rope is not None
    q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in layer.qkv(x).chunk(3, dim=-1))
    turn = layer.rope.rotation(positions)
    q, k = rotate(layer.qk_norm(q), *turn), rotate(layer.qk_norm(k), *turn)
    scale = entropy_factor(64, 16) / math.sqrt(8)
    y = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    with apply_resolution(Net(), native=(4, 4), target=(8, 8)) as scaled:
        got = scaled.model(x)
    torch.testing.assert_close(got, layer.out(y), atol=1e-6, rtol=1e-6)


def test_a_model_without_softmax_self_attention_is_refused_and_left_clean() -> None:
    model = tiny_dit(attention="nala")
    with (
        pytest.raises(ConfigError, match="entropy of attention cannot be kept in DiT"),
        apply_resolution(model, [EntropyAttention()], target=(8, 8)),
    ):
        pass
    assert hooks_of(model) == 0


def test_unit_tells_sizes_of_inputs_in_pixels() -> None:
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    model, x = Holder(layer), sample(1, 16, 16)
    plain = model(x)
    op = EntropyAttention(unit=16)  # 16 pixels a token: 16 tokens are 64 x 64 pixels
    with apply_resolution(model, [op], native=(64, 64), target=(128, 128)):
        assert torch.equal(model(x), plain)
        assert not torch.equal(model(sample(1, 64, 16))[:, :16], plain)


@torch.no_grad()
@pytest.mark.parametrize("prefix", [True, False])
def test_a_scale_is_compared_with_its_number_in_training(prefix: bool) -> None:
    model = VAR(
        scales=[1, 2, 4], depth=1, hidden_size=8, num_heads=1, latent_channels=2, vocab_size=4,
        num_classes=0,
    )  # fmt: skip
    layer = model.blocks[0].attention
    layer.prefix = prefix
    with apply_resolution(model, [EntropyAttention()], target=(8, 8)):
        assert layer.logit_factors is not None
        spans = scale_spans(model.at_size(8, 8).scales)
        got = layer.logit_factors(spans)
    sides = [side for side, _ in model.at_size(8, 8).scales]
    assert sides == [1, 3, 8]
    counts = [(1, 1), (5, 10), (21, 74)] if prefix else [(1, 1), (4, 9), (16, 64)]
    assert got == pytest.approx([entropy_factor(now, before) for before, now in counts])
    assert layer.logit_factors is None
    q, k, v = (torch.randn(1, 1, 21, 8) for _ in range(3))
    plain = scale_spans(model.scales)
    attend = partial(attend_by_scale, spans=plain, prefix=True)
    torch.testing.assert_close(
        attend(q, k, v, factors=lambda spans: [2.0] * len(spans)), attend(2 * q, k, v)
    )


@torch.no_grad()
def test_latents_that_read_patches_and_frames_of_videos_are_kept() -> None:
    rin = RIN(
        input_size=8, in_channels=2, patch_size=2, tape_width=16, latent_width=16, num_latents=4,
        depth=1, compute_depth=1, num_heads=2, head_size=8, qk_norm=True,
    )  # fmt: skip
    read, seen = rin.blocks[0].read, []
    read.q_norm.register_forward_hook(lambda module, args, out: seen.append(out))
    args = torch.randn(1, 2, 16, 16), torch.zeros(1), Conditioning()
    rin(*args)
    with apply_resolution(rin, [EntropyAttention()], target=(16, 16)):
        read.q_norm.register_forward_hook(lambda module, args, out: seen.append(out))
        rin(*args)
    torch.testing.assert_close(seen[-1], seen[0] * entropy_factor(64, 16))
    video = CausalVideo(
        input_size=[3, 8, 8], in_channels=2, hidden_size=24, depth=1, num_heads=2, mlp_size=24
    )
    layer, x = video.blocks[0].attention, torch.randn(1, 3, 24)
    plain = layer.q_norm(x)
    cell = math.prod(video.size_step)
    with apply_resolution(video, [EntropyAttention()], target=(16, 16)):
        factor = entropy_factor(3 * 256 / cell, 3 * 64 / cell)
        torch.testing.assert_close(layer.q_norm(x), plain * factor)
    assert torch.equal(layer.q_norm(x), plain)
