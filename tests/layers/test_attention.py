"""Self-attention, rotary positions and cosine logits against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.layers.attention import SHORT, CosineNorm, SelfAttention, attend
from genscale.layers.rope import AxialRoPE, axial_positions, rotate


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_attention_is_softmax_of_scaled_products_with_heads_laid_out_q_k_v() -> None:
    layer, x = SelfAttention(6, 2), sample(2, 5, 6)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)  # [q heads | k heads | v heads]
    heads = []
    for h in (slice(0, 3), slice(3, 6)):
        weights = torch.softmax(q[..., h] @ k[..., h].transpose(1, 2) / math.sqrt(3), dim=-1)
        heads.append(weights @ v[..., h])
    torch.testing.assert_close(layer(x), layer.out(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize("mask", ["none", "bool", "numbers"])
def test_attend_is_torchs_attention(mask: str) -> None:
    q, k, v = sample(2, 3, 4, 8), sample(2, 3, 5, 8, seed=1), sample(2, 3, 5, 8, seed=2)
    allowed = {"none": None, "bool": sample(4, 5) > -1, "numbers": sample(2, 1, 4, 5)}[mask]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.3)
    assert torch.equal(attend(q, k, v, mask=allowed, scale=0.3), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_short_attention_in_bfloat16_is_trained_in_float32(autocast: bool) -> None:
    q, k, v = (sample(2, 3, 6, 8, seed=i).bfloat16() for i in range(3))
    bias = sample(6, 6, seed=3).bfloat16()
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, attn_mask=bias.float())
    given = [x.float() if autocast else x.clone() for x in (q, k, v)]
    given = [x.requires_grad_() for x in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = attend(*given, mask=bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())  # one rounding, at the end
    y.float().square().sum().backward()
    expected.bfloat16().float().square().sum().backward()
    for own, other in zip(given, wide, strict=True):
        torch.testing.assert_close(own.grad.float(), other.grad, rtol=1e-2, atol=1e-3)


def test_long_attention_and_sampling_stay_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    torchs = F.scaled_dot_product_attention

    def watched(q: Tensor, *rest: Tensor, **named: Tensor) -> Tensor:
        seen.append(q.dtype)
        return torchs(q, *rest, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for tokens, grad in ((SHORT, True), (SHORT + 1, True), (SHORT, False)):
        x = sample(1, 1, tokens, 4).bfloat16()
        with torch.set_grad_enabled(grad):
            attend(x, x, x)
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_positions_are_cell_centres_and_the_shorter_axis_is_shrunk() -> None:
    positions = axial_positions(2, 4)
    # four cells of width 0.5 over [-1, 1]; two cells of the same width over [-0.5, 0.5]
    columns = [-0.75, -0.25, 0.25, 0.75]
    expected = [[row, column] for row in (-0.25, 0.25) for column in columns]
    torch.testing.assert_close(positions, torch.tensor(expected))


def test_rotation_turns_interleaved_pairs() -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 5)
    angles = torch.tensor([math.pi / 2, math.pi]).view(1, 1, 2)
    y = rotate(x, angles.cos(), angles.sin())
    # (1, 0) by 90 degrees is (0, 1); (0, 1) by 180 degrees is (0, -1); the fifth channel stays
    torch.testing.assert_close(y.flatten(), torch.tensor([0.0, 1.0, 0.0, -1.0, 7.0]))


def test_products_of_rotated_vectors_depend_on_relative_place_only() -> None:
    rope = AxialRoPE(8, 1)
    cosine, sine = rope.rotation(torch.tensor([[0.1, 0.2], [0.4, 0.6], [0.3, -0.1], [0.6, 0.3]]))
    q, k = sample(8), sample(8, seed=1)
    q_at = rotate(q.expand(1, 1, 4, 8), cosine, sine)[0, 0]
    k_at = rotate(k.expand(1, 1, 4, 8), cosine, sine)[0, 0]
    # places 0 -> 1 and 2 -> 3 are the same displacement (0.3, 0.4)
    torch.testing.assert_close(q_at[0] @ k_at[1], q_at[2] @ k_at[3])
    assert not torch.allclose(q_at[0] @ k_at[1], q_at[0] @ k_at[2])


def test_a_class_token_is_not_rotated() -> None:
    cosine, sine = AxialRoPE(8, 2).rotation(axial_positions(2, 2), num_prefix_tokens=1)
    assert cosine.shape == (2, 5, 4)
    assert torch.equal(cosine[:, 0], torch.ones(2, 4))
    assert torch.equal(sine[:, 0], torch.zeros(2, 4))


def test_cosine_norm_makes_logits_ten_times_the_cosine_at_the_start() -> None:
    norm, q, k = CosineNorm(1), sample(1, 1, 1, 16), sample(1, 1, 1, 16, seed=1)
    logit = (norm(q) * norm(k)).sum() / math.sqrt(16)
    cosine = torch.nn.functional.cosine_similarity(q, k, dim=-1).squeeze()
    torch.testing.assert_close(logit, 10 * cosine, rtol=1e-4, atol=1e-5)


def test_cosine_norm_is_bounded_but_can_come_back() -> None:
    norm, q = CosineNorm(1), sample(1, 1, 1, 16)
    torch.nn.init.constant_(norm.scale, math.log(100.0))
    bounded = norm(q)
    torch.nn.init.constant_(norm.scale, 9.0)
    torch.testing.assert_close(norm(q), bounded)
    norm(q).sum().backward()
    assert norm.scale.grad is not None
    assert norm.scale.grad.abs() > 0


def test_rotary_attention_takes_a_class_token_before_the_grid() -> None:
    layer = SelfAttention(16, 2, axial_rope=True)
    tokens = sample(1, 5, 16)
    y = layer(tokens, axial_positions(2, 2))
    # swapping two cells of the picture changes more than their order: places matter
    swapped = layer(tokens[:, [0, 2, 1, 3, 4]], axial_positions(2, 2))
    assert y.shape == (1, 5, 16)
    assert not torch.allclose(y[:, 0], swapped[:, 0], atol=1e-5)
