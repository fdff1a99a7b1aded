"""Parts of FIT that Snap Video leaves out, and places of patches in clips of other sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from genscale import rng
from genscale.backbones.fit import FIT
from genscale.backbones.fit_context import ContextTokens
from genscale.backbones.fit_groups import GroupedPositions, Groups
from genscale.backbones.fit_layers import (
    Attention,
    FeedForward,
    HeadNorm,
    LocalConvolution,
    NumberEmbedding,
    SelfConditioning,
    gain_norm,
    modulated,
)
from genscale.backbones.fit_settings import ExtraInput, read_extra_inputs
from genscale.backbones.reuse import recorded, replaced, reusable_modules
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import Batch
from genscale.objectives.edm import EDM
from genscale.samplers.ode import Heun
from tests.backbones.test_fit import TINY, batch, build

# places


def test_places_of_another_size_keep_their_place_in_the_picture() -> None:
    groups = Groups.of((2, 8, 8), (1, 2, 2), (2, 2, 2))
    positions = GroupedPositions(groups, 1)
    # what is written into the table: the column of every patch, group by group
    columns = torch.arange(4.0).repeat_interleave(2).repeat(2, 8, 1)  # pixels of (2, 8, 8)
    with torch.no_grad():
        positions.table.copy_(groups.cut(columns[None, None])[..., :1].flatten(0, 1))
    assert torch.equal(positions(groups).flatten(), positions.table.flatten())
    wider = Groups.of((2, 8, 16), (1, 2, 2), (2, 2, 2))
    stretched = positions(wider)
    assert stretched.shape == (wider.number, wider.length, 1)
    clip = wider.join(stretched.expand(-1, -1, 4))  # a place fills its patch
    expected = F.interpolate(torch.arange(4.0)[None, None], size=8, mode="linear")[0, 0]
    expected = expected.repeat_interleave(2).expand(2, 8, 16)
    torch.testing.assert_close(clip[0, 0], expected)


def test_clips_of_other_sizes_are_accepted() -> None:
    model, (_, t, cond) = build(), batch()
    for size in ((2, 8, 6), (4, 8, 12), (2, 4, 24)):
        x = torch.randn(3, 2, *size)
        assert model(x, t, cond).sample.shape == x.shape


# extra inputs, the last convolution


def test_extra_inputs_are_averages_of_the_clip() -> None:
    (extra,) = read_extra_inputs([{"kernel": [1, 2, 2]}])
    assert extra == ExtraInput((1, 2, 2), "nearest")
    clip = torch.randn(1, 2, 2, 4, 4)
    view = extra.view_of(clip)
    torch.testing.assert_close(view[0, 1, 1, 2:, :2], clip[0, 1, 1, 2:, :2].mean().expand(2, 2))
    model, (x, t, cond) = build(extra_inputs=[{"kernel": [2, 4, 4], "mode": "trilinear"}]), batch()
    assert model.patch.in_features == 2 * 2 * 4
    assert model(x, t, cond).sample.shape == x.shape


def test_the_last_convolution_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    plain = FIT(**_settings())
    smooth = FIT(**_settings(), output_conv=True).eval()
    smooth.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(smooth(*batch()).sample, plain.eval()(*batch()).sample)


def _settings(**changes: Any) -> dict[str, Any]:
    return {**TINY, **changes}


# local convolutions


def test_a_local_convolution_is_what_its_formula_says() -> None:
    torch.manual_seed(0)
    layer = LocalConvolution(6, (2, 3, 4), 5)
    x, c = torch.randn(2, 24, 6), torch.randn(2, 5)
    for n in range(2):
        scale, shift = layer.modulation(F.silu(c[n])).chunk(2)
        for frame, tokens in enumerate(x[n].unflatten(0, (2, 3, 4))):
            y = layer.first(layer.norm(tokens).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
            y = F.gelu((1 + scale) * y + shift)
            y = layer.second(y.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
            found = layer(x, c)[n].unflatten(0, (2, 3, 4))[frame]
            torch.testing.assert_close(found, tokens + y, rtol=1e-4, atol=1e-5)


def test_a_fresh_local_convolution_changes_nothing() -> None:
    model, (x, t, cond) = build(local_depth=1, local_kind="convolution"), batch()
    fresh = FIT(**_settings(local_depth=1, local_kind="convolution"))
    same: list[bool] = []
    fresh.blocks[0].local_layers[0].register_forward_hook(
        lambda module, args, out: same.append(torch.equal(args[0], out))
    )
    fresh(x, t, cond)
    assert same == [True]
    assert model(x, t, cond).sample.shape == x.shape


def test_local_convolutions_know_noise_level_and_text() -> None:
    model, (x, t, cond) = build(local_depth=1, local_kind="convolution"), batch()
    seen: list[torch.Tensor] = []
    model.blocks[0].local_layers[0].register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    model(x, t, cond)
    model(x, t + 0.5, cond)
    model(x, t, replace(cond, text=cond.text + 1.0))
    groups = len(seen[0]) // 3
    assert not torch.allclose(seen[0], seen[1])
    changed = [not torch.allclose(a, b) for a, b in zip(seen[0], seen[2], strict=True)]
    # a group's rows are its sample's; the second sample has no text that counts
    assert changed == [True] * groups + [False] * groups + [True] * groups


def test_an_unknown_kind_of_local_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="convolution"):
        FIT(**_settings(local_depth=1, local_kind="convolutions"))


# the first FIT


def test_the_first_fit_shares_places_and_reads_the_context_last() -> None:
    model = build(arch="fit_original", cross_mlp=False, local_depth=2)
    assert model.positions.table.shape == (12, 12)  # the patches of one group
    assert model.head_norm.eps == 1e-6
    order: list[str] = []
    for name in ("context", "read"):
        getattr(model.blocks[0], name).register_forward_hook(
            lambda module, args, out, name=name: order.append(name)
        )
    x, t, cond = batch()
    assert model(x, t, cond).sample.shape == x.shape
    assert order == ["read", "context"]
    # groups know each other through the latents alone: shifted by a group, patches start alike
    patches: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: patches.append(args[0]))
    model(x, t, cond)
    model(x.roll(6, dims=-1), t, cond)
    one, other = (part.unflatten(0, (3, 2, 2)) for part in patches)  # samples, rows, columns
    torch.testing.assert_close(one, other.roll(1, dims=2))
    model(x[:, :, :, :4], t, cond)  # and any number of groups will do


def test_without_the_quirk_a_missing_layer_adds_nothing() -> None:
    settings = {"cross_mlp": False, "depth": 1}
    plain, doubled = build(**settings), build(**settings, double_residual_quirk=True)
    x, t, cond = batch()
    assert (plain(x, t, cond).sample - doubled(x, t, cond).sample).abs().max() > 1e-3
    seen: dict[str, torch.Tensor] = {}
    block = plain.blocks[0]
    block.register_forward_pre_hook(lambda module, args: seen.update(before=args[0]))
    block.register_forward_hook(lambda module, args, out: seen.update(after=out[0]))
    block.write.register_forward_hook(lambda module, args, out: seen.update(change=out))
    plain(x, t, cond)
    torch.testing.assert_close(seen["after"], seen["before"] + seen["change"])


# layers


def test_attention_reads_its_context_through_a_norm_of_its_own() -> None:
    torch.manual_seed(0)
    layer = Attention(6, 4, 2, 3)
    x, context = torch.randn(2, 5, 6), torch.randn(2, 7, 4)
    same = layer(x, 3.0 * context + 2.0)  # what a norm takes away
    torch.testing.assert_close(layer(x, context), same, rtol=1e-4, atol=1e-4)
    alone = layer(x, context[:, :1])  # one place: all queries read its value
    torch.testing.assert_close(alone, alone[:, :1].expand_as(alone))


def test_a_condition_scales_and_shifts_the_queries() -> None:
    modulation = torch.nn.Linear(3, 8)
    y, c = torch.randn(2, 5, 4), torch.randn(2, 3)
    scale, shift = modulation(F.silu(c)).chunk(2, dim=-1)
    torch.testing.assert_close(
        modulated(y, modulation, c), y * (1 + scale[:, None]) + shift[:, None]
    )
    assert modulated(y, None, c) is y


def test_heads_are_normed_to_the_root_of_their_size() -> None:
    norm = HeadNorm(2, 9)
    torch.nn.init.ones_(norm.gain)
    lengths = norm(torch.randn(1, 2, 4, 9)).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 3.0))


def test_the_past_goes_through_a_layer_and_a_gain() -> None:
    torch.manual_seed(0)
    past = SelfConditioning(6)
    latents, before = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    known = torch.tensor([True, False])
    out = past(latents, before, known)
    expected = latents[0] + F.layer_norm(past.mlp(before[0]), (6,))
    torch.testing.assert_close(out[0], expected)
    assert torch.equal(out[1], latents[1])
    assert isinstance(past.mlp, FeedForward)


def test_gain_norms_have_no_bias() -> None:
    assert [name for name, _ in gain_norm(4).named_parameters()] == ["weight"]


def test_numbers_become_waves() -> None:
    embed = NumberEmbedding(1, 4, 6, frequencies=2)
    with torch.no_grad():
        embed.frequencies.copy_(torch.tensor([0.25, 0.5]))
    seen: list[torch.Tensor] = []
    embed.linear_1.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    assert embed(torch.tensor([1.0])).shape == (1, 6)
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0, -1.0]])
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=0)


def test_context_tokens_stand_in_their_order() -> None:
    torch.manual_seed(0)
    tokens = ContextTokens(
        6, 8, text_size=4, num_text_tokens=2, reads_size=True, size_unit=64.0,
        reads_frame_rate=True, reads_level=True, num_classes=3,
    )  # fmt: skip
    t, size = torch.tensor([0.5]), torch.tensor([[32.0, 128.0]])
    cond = Conditioning(labels=torch.tensor([1]), size=size, text=torch.ones(1, 2, 4))
    found = tokens(t, cond, 1)
    assert found.shape == (1, 2 + 1 + 1 + 1 + 1 + 1, 6)
    torch.testing.assert_close(found[:, 2], tokens.time(t))
    torch.testing.assert_close(found[:, 3], tokens.picture_size(torch.tensor([[0.5, 2.0]])))
    assert not found[:, 4:6].any()  # neither frame rate nor level was given
    torch.testing.assert_close(found[0, 6], tokens.classes.weight[1])


@pytest.mark.parametrize("reads", [True, False])
def test_what_operations_are_counted_on_is_what_the_network_reads(reads: bool) -> None:
    model = build(reads_frame_rate=reads, reference_channels=2 if reads else 0)
    cond = model.example_condition("cpu")
    assert (cond.frame_rate is not None) == reads
    assert (cond.reference_level is not None) == reads
    x, t, cond, past = model.example((2, 2, 8, 12), "cpu")
    assert model(x, t, cond, past).sample.shape == (1, 2, 2, 8, 12)
    assert past["known"].all()


def test_global_layers_can_be_reused_by_step_caching() -> None:
    model, inputs = build(local_depth=1), batch()
    modules = reusable_modules(model)
    assert sorted(modules) == [
        f"blocks.{b}.global_layers.0.{part}" for b in (0, 1) for part in ("attention", "mlp")
    ]
    with recorded(modules) as outputs:
        whole = model(*inputs).sample
    assert all(len(output) == 3 for output in outputs.values())  # a row a sample
    with replaced(modules, outputs.__getitem__):
        torch.testing.assert_close(model(*inputs).sample, whole)


def test_training_on_memory_reaches_the_layers_of_the_past() -> None:
    torch.manual_seed(0)
    model = FIT(**_settings(text_size=0, reads_size=False))
    clean = torch.rand(4, 2, 2, 8, 12) * 2 - 1
    data = Batch(clean=clean, cond=Conditioning(), position=torch.arange(4))
    objective = EDM(sigma_data=1.0, sigma_in=2**0.5, self_conditioning=0.9)
    out = objective.loss(model, data, rng.for_step(0, data.position))
    out.loss.backward()
    assert model.past.norm.weight.grad.abs().max() > 0
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_memory_travels_from_step_to_step_of_a_sampler() -> None:
    model = build(text_size=0, reads_size=False)
    view = EDM(sigma_data=1.0, sigma_in=2**0.5).view(model)
    sampler = Heun(steps=2)
    state = sampler.start(view, Conditioning(), torch.arange(2))
    states = []
    with torch.no_grad():
        for _ in range(2):
            state = sampler.advance(view, sampler.evaluate(view, state))
            states.append(state.memory["latents"])
    assert states[0].shape == (2, 8, 16)
    assert not torch.equal(*states)
    assert sampler.finish(state).shape == (2, 2, 2, 8, 12)
