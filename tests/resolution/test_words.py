"""Attention looked at from outside: entropy by layer, and which words belong to which window."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from genscale.backbones.dit import DiT
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.attention import SelfAttention
from genscale.layers.cross_attention import CrossAttention
from genscale.resolution import EntropyAttention, apply_resolution
from genscale.resolution.attention_probe import AttentionProbe, WordMaps, entropies_by_layer
from genscale.resolution.entropy import attention_entropy
from genscale.resolution.flow_guided import align
from genscale.resolution.frequency import butterworth, low_pass
from genscale.resolution.noise_alignment import edges, noise_map
from genscale.resolution.patch_prompts import (
    PatchPrompts,
    ScreenedPrompts,
    WindowPrompts,
    opened,
    word_masks,
)
from genscale.resolution.regional import DescribedWindows, RegionalWindows, StructurePrior
from genscale.resolution.window_cascades import CUpscale, word_maps


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_entropy_of_a_layer_is_that_of_its_queries_and_keys() -> None:
    layer, x = SelfAttention(8, 2), noise(2, 9, 8)
    q, k, _ = (part.view(2, 9, 2, 4).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    found = entropies_by_layer(nn.Sequential(layer), lambda: layer(x))
    expected = attention_entropy(q, k).mean().item()
    assert found == {"0": pytest.approx(expected, rel=1e-5)}


@torch.no_grad()
def test_entropy_drifts_with_the_size_and_the_factor_holds_it() -> None:
    torch.manual_seed(0)
    model = DiT(input_size=16, in_channels=2, num_classes=0, hidden_size=64, depth=1, num_heads=1)
    layer = model.blocks[0].attention
    layer.qkv.weight.normal_(std=(2.4 / 64) ** 0.5)  # logits of deviation 2.4

    def entropy(cells: int, *, kept: bool = False) -> float:
        x = noise(2, cells, 64)
        if not kept:
            return next(iter(entropies_by_layer(layer, lambda: layer(x)).values()))
        side = round(cells**0.5)
        ops, sizes = [EntropyAttention()], {"native": (8, 8), "target": (side, side)}
        with apply_resolution(layer, ops, **sizes):
            return next(iter(entropies_by_layer(layer, lambda: layer(x)).values()))

    trained, drifted, held = entropy(64), entropy(1024), entropy(1024, kept=True)
    assert drifted - trained > 1.5  # of log 16 = 2.8
    assert abs(held - trained) < 0.6 * (drifted - trained)  # 1.1 of 2.1, measured


def test_a_probe_names_the_layer_and_leaves_no_trace() -> None:
    layer, seen = SelfAttention(8, 2), []
    model = nn.ModuleDict({"a": layer, "b": nn.Linear(8, 8)})
    with AttentionProbe(model, lambda name, q, k, mask, factor: seen.append((name, factor))):
        layer(model["b"](noise(1, 4, 8)))
    layer(noise(1, 4, 8))
    assert seen == [("a", 1.0)]
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_maps_of_words_are_attention_of_the_conditions_own_rows() -> None:
    layer, x, context = CrossAttention(8, 2, 6), noise(4, 6, 8), noise(4, 3, 6, seed=1)
    mask = torch.tensor([[True, True, False]] * 4)
    kv = layer.project(context)
    with WordMaps(nn.Sequential(layer), (2, 3)) as maps:
        layer(x, kv, mask)
        layer(x[:2], tuple(part[:2] for part in kv), mask[:2])  # guidance rests
    got = maps.mean(2)
    assert got is not None
    assert got.shape == (2, 3, 2, 3)
    q = layer.q(x).view(4, 6, 2, 4).transpose(1, 2)
    logits = q @ kv[0].transpose(-1, -2) / 2
    expected = logits.masked_fill(~mask[:, None, None], -math.inf).softmax(-1).mean(1)
    torch.testing.assert_close(got.flatten(2), expected[:2].transpose(1, 2))
    assert WordMaps(nn.Sequential(layer), (2, 3)).mean(2) is None
    assert word_maps(SelfAttention(8, 2), (2, 2)) is None
    assert isinstance(word_maps(nn.Sequential(layer), (2, 3)), WordMaps)


def test_masks_of_words_lose_their_specks() -> None:
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., 4:12, 4:12] = True
    clean = mask.clone()
    mask[..., 20, 20] = True
    assert torch.equal(opened(mask, 2), clean)
    assert torch.equal(word_masks(mask.float()), clean)  # 32 // 16 rounds
    assert torch.equal(opened(mask[0], 0), mask[0])


def test_windows_keep_the_words_that_cover_them() -> None:
    maps = torch.zeros(2, 3, 4, 4)
    maps[:, 0, :2] = 1  # upper half
    maps[:, 1, :, :1] = 1  # left quarter
    text = noise(2, 3, 5)
    cond = Conditioning(
        text=text, text_mask=torch.tensor([[True, True, True], [False, True, True]])
    )
    boxes = [(-1, 4, 0, 4), (4, 8, 4, 8)]  # one reaches beyond the picture
    got = PatchPrompts(maps, (8, 8), coverage=0.3)(cond, boxes)
    assert got.text_mask is not None
    # lower right: no word is left, and so all are; the sample's own mask stays
    assert got.text_mask.tolist() == [
        [True, True, False], [False, True, False], [True, True, True], [False, True, True]
    ]  # fmt: skip
    assert got.text is not None
    assert torch.equal(got.text, text.repeat(2, 1, 1))
    screened = ScreenedPrompts(maps, (8, 8), floor=1.5)(cond, boxes).text_mask
    assert screened is not None
    assert screened[0].tolist() == [True, True, False]
    labels = Conditioning(labels=torch.tensor([3, 4]))
    windows = PatchPrompts(maps, (8, 8))(labels, boxes)
    assert windows.labels is not None
    assert windows.labels.tolist() == [3, 4, 3, 4]
    with pytest.raises(NotImplementedError, match="must implement keep"):
        WindowPrompts(maps, (8, 8)).keep(torch.zeros(2, 3))


def test_structure_is_held_less_and_less() -> None:
    x0, guide = noise(1, 1, 8, 8), noise(1, 1, 8, 8, seed=1)
    op = StructurePrior(guide, 4, weight=0.8, ratio=0.4)
    for step, share in ((0, 1.0), (2, 0.5)):
        mask = butterworth(8, 8, 0.4 * share, centred=True)
        expected = align(x0, guide, 0.8 * share, lambda x, mask=mask: low_pass(x, mask))
        torch.testing.assert_close(op.post_x0(x0, x0, 0.5, step), expected)
    assert op.post_x0(x0, x0, 0.1, 4) is x0


def test_described_windows_mix_in_what_they_show() -> None:
    pictures = torch.zeros(2, 1, 16, 16)
    pictures[..., 8:] = 1
    asked: list[float] = []

    def describe(part: Tensor) -> list[str]:
        asked.append(float(part.mean()))
        return [str(int(part.mean() > 0))] * len(part)

    def encode(captions) -> Conditioning:
        return Conditioning(labels=torch.tensor([int(text) for text in captions]))

    def call(x: Tensor, level: object, cond: Conditioning) -> Tensor:
        assert cond.labels is not None
        return cond.labels.view(-1, 1, 1, 1).expand_as(x).float()

    described = DescribedWindows(pictures, (8, 8), describe, encode)
    op = RegionalWindows(None, described, share=0.25, stride=4)
    op.prepare(None, (4, 4), (8, 8))
    op.pre_step(pictures, 0.5, 0)
    x, cond = torch.zeros(2, 1, 8, 8), Conditioning(labels=torch.full((2,), 8))
    for _ in range(2):
        out = op.wrap_model(call)(x, None, cond)
        assert out[0, 0, 0, ::4].tolist() == [6.0, 6.25]  # 3/4 of 8 and 1/4 of 0 or 1
    assert asked == [0.0, 1.0, 0.0, 1.0]  # a window is described once
    plain = RegionalWindows(stride=4)
    plain.prepare(None, (4, 4), (8, 8))
    assert torch.equal(plain.wrap_model(call)(x, None, cond), torch.full_like(x, 8.0))
    wrong = DescribedWindows(pictures, (8, 8), lambda part: ["one"], encode)
    with pytest.raises(ConfigError, match="a caption for each of 2 pictures, but returned 1"):
        wrong(cond, [(0, 4, 0, 4)])
    assert (CUpscale().describe, CUpscale().encode) == (None, None)


def test_edges_are_thin_and_where_the_picture_jumps() -> None:
    picture = -torch.ones(1, 3, 16, 16)
    picture[..., 8:] = 1
    found = edges(picture)
    assert found.sum(-1).flatten().tolist() == [1.0] * 16  # one pixel a row
    assert found[..., 7:9].sum() == 16
    assert edges(torch.zeros(1, 3, 16, 16)).sum() == 0
    deviation = noise_map(picture, (4, 4), least=0.1, most=1.2)
    assert deviation.shape == (1, 1, 4, 4)
    assert (float(deviation.min()), float(deviation.max())) == pytest.approx((0.1, 1.2))
