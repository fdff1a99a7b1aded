"""FIT: what its layers compute, what it costs, what it remembers and what it is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.base import parameter_count
from genscale.backbones.fit import FIT, FITBlock
from genscale.backbones.fit_groups import Groups
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.io.converters.fit import config_to_official, to_official
from tests.backbones import plain_fit

TINY: dict[str, Any] = {
    "input_size": (2, 8, 12),
    "in_channels": 2,
    "patch_size": (1, 2, 2),
    "group_size": (2, 2, 3),
    "patch_width": 12,
    "latent_width": 16,
    "context_width": 8,
    "num_latents": 8,
    "depth": 2,
    "global_depth": 1,
    "patch_head_size": 6,
    "latent_head_size": 4,
    "dropout": 0.1,
    "text_size": 5,
    "num_text_tokens": 3,
    "reads_size": True,
}
SIZES_500M: dict[str, Any] = {"text_size": 1024, "reads_size": True}
SIZES_3_9B: dict[str, Any] = {
    **SIZES_500M,
    "patch_width": 1024,
    "latent_width": 3072,
    "context_width": 1024,
    "num_latents": 768,
    "patch_head_size": 64,
    "latent_head_size": 128,
}


def build(**changes: Any) -> FIT:
    """A tiny model whose weights are all random, so that nothing is at its silent start."""
    torch.manual_seed(0)
    model: FIT = FIT(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def on_meta(**settings: Any) -> FIT:
    with torch.device("meta"):
        return FIT(**settings)


def batch(size: tuple[int, ...] = (2, 8, 12)) -> tuple[Tensor, Tensor, Conditioning]:
    numbers = torch.Generator().manual_seed(1)
    cond = Conditioning(
        text=torch.randn(3, 3, 5, generator=numbers),
        text_mask=torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 1]]).bool(),
        size=torch.rand(3, 2, generator=numbers),
        frame_rate=torch.tensor([8.0, 24.0, math.inf]),
    )
    x = torch.randn(3, 2, *size, generator=numbers)
    return x, torch.tensor([-1.0, 0.3, 0.8]), cond


def memory(known: list[bool]) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(2)
    return {"latents": torch.randn(3, 8, 16, generator=numbers), "known": torch.tensor(known)}


# the network is what the formulas say

VARIANTS: dict[str, dict[str, Any]] = {
    "snap": {"text_null_token": True},
    "local layers, no feed-forward after cross-attention": {
        "local_depth": 1,
        "cross_mlp": False,
        "double_residual_quirk": True,
        "dropout": 0.0,
        "text_null_token": True,
    },
    "groups do not span time": {
        "group_size": (1, 4, 2),
        "num_latents": 12,
        "heads": {"context": [3, 5], "read": [1, 7]},
        "text_null_token": True,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_what_the_formulas_say(name: str) -> None:
    model = build(**VARIANTS[name])
    x, t, cond = batch()
    past = torch.randn(3, len(model.latents), 16, generator=torch.Generator().manual_seed(3))
    known = torch.tensor([True, False, True])
    out = model(x, t, cond, {"latents": past, "known": known})
    official = config_to_official(model.config)
    assert official is not None
    state = {
        key: value.detach() for key, value in to_official(model.state_dict(), model.config).items()
    }
    for n in range(3):
        sample, latents = plain_fit.fit(
            state,
            {**official, "num_words": 3},
            x[n],
            t[n],
            cond.text[n] if n != 1 else None,  # type: ignore[index]
            cond.size[n],  # type: ignore[index]
            past[n] if known[n] else None,
        )
        torch.testing.assert_close(out.sample[n], sample, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(out.memory["latents"][n], latents, rtol=1e-4, atol=2e-5)


def test_groups_come_before_patches_and_channels_before_pixels() -> None:
    groups = Groups.of((2, 4, 8), (1, 2, 2), (1, 2, 2))
    assert (groups.counts, groups.number, groups.length) == ((2, 1, 2), 4, 4)
    clip = torch.arange(2 * 2 * 4 * 8).view(1, 2, 2, 4, 8).float()
    cut = groups.cut(clip)
    assert cut.shape == (4, 4, 8)
    assert cut.is_contiguous()
    # second group: first frame, columns 4 to 7; its third patch: rows 2 and 3, columns 4 and 5
    assert torch.equal(cut[1, 2], clip[0, :, 0, 2:4, 4:6].flatten())
    assert torch.equal(cut[2, 0], clip[0, :, 1, 0:2, 0:2].flatten())
    assert torch.equal(groups.join(cut), clip)


# published sizes


@pytest.mark.parametrize(
    ("settings", "millions", "gmacs"),
    [
        (SIZES_500M, 497.35, 351),
        (SIZES_3_9B, 3916.18, 3218),
        # six channels, in and out, for the noisy clip and the small one: the published count
        (
            {
                **SIZES_3_9B,
                "input_size": (16, 288, 512),
                "group_size": (16, 18, 16),
                "in_channels": 6,
            },
            4064.65,
            14267,
        ),
        ({**SIZES_500M, "local_depth": 2}, 597, 623),
    ],
    ids=["500m", "3_9b", "upsampler", "500m with local layers"],
)
def test_published_parameters_and_operations(
    settings: dict[str, Any], millions: float, gmacs: int
) -> None:
    model = on_meta(**settings)
    digits = 2 if millions % 1 else 0
    assert round(parameter_count(model) / 1e6, digits) == millions
    assert round(model.flops() / 2e9) == gmacs


def test_more_latents_cost_more() -> None:
    flops = [on_meta(**{**TINY, "num_latents": n}).flops() for n in (4, 8, 16)]
    assert flops[2] - flops[1] > 2 * (flops[1] - flops[0]) > 0  # global attention is quadratic


# memory


def test_what_is_not_known_counts_as_no_memory() -> None:
    model, (x, t, cond) = build(), batch()
    none = model(x, t, cond).sample
    garbage = memory([False] * 3)
    garbage["latents"][1] = math.nan
    assert torch.equal(model(x, t, cond, garbage).sample, none)
    some = model(x, t, cond, memory([True, False, True])).sample
    torch.testing.assert_close(some[1], none[1], rtol=1e-5, atol=1e-6)
    assert (some - none).abs().flatten(1).amax(1)[[0, 2]].min() > 1e-3


def test_a_call_hands_its_last_latents_to_the_next() -> None:
    model, (x, t, cond) = build(), batch()
    first = model(x, t, cond)
    assert first.memory["latents"].shape == (3, 8, 16)
    assert first.memory["known"].tolist() == [True] * 3
    again = model(x, t, cond, first.memory)
    assert not torch.equal(again.sample, first.sample)
    assert FIT.self_conditioning


def test_a_fresh_model_ignores_its_past_but_learns_to_use_it() -> None:
    torch.manual_seed(0)
    model, (x, t, cond) = FIT(**TINY).eval(), batch()
    out = model(x, t, cond, memory([True] * 3))
    assert torch.equal(out.sample, model(x, t, cond).sample)
    out.sample.square().mean().backward()
    assert model.past.norm.weight.grad.abs().max() > 0


# conditions


def test_a_picture_is_a_clip_of_equal_frames() -> None:
    model, (_, t, cond) = build(), batch()
    picture = torch.randn(3, 2, 8, 12)
    clip = picture[:, :, None].expand(-1, -1, 2, -1, -1)
    out = model(picture, t, cond)
    assert out.sample.shape == picture.shape
    torch.testing.assert_close(out.sample, model(clip, t, cond).sample.mean(2))


def test_a_network_of_pictures_has_one_frame() -> None:
    model = build(input_size=(8, 12), group_size=(1, 2, 3))
    assert model.sample_shape == (2, 8, 12)
    x, t, cond = batch((8, 12))
    assert model(x, t, cond).sample.shape == x.shape


def test_the_frame_rate_is_a_token_and_a_still_picture_has_no_period() -> None:
    model, (x, t, cond) = build(reads_frame_rate=True), batch()
    seen: list[Tensor] = []
    model.context.frame_rate.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    whole = model(x, t, cond).sample
    # in units of 1/24 s
    torch.testing.assert_close(seen[0], torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    other = model(x, t, Conditioning(text=cond.text, text_mask=cond.text_mask, size=cond.size))
    assert (whole - other.sample).abs().max() > 1e-3  # none given: a token of zeros
    null = cond.null()  # not the wish, but what the clip is
    assert null.frame_rate is not None
    assert torch.equal(null.frame_rate, torch.tensor([8.0, 24.0, math.inf]))


@pytest.mark.parametrize("null_token", [False, True])
def test_no_text_is_text_that_is_masked_out(null_token: bool) -> None:
    model, (x, t, cond) = build(text_null_token=null_token), batch()
    none = model(x, t, Conditioning(size=cond.size)).sample
    torch.testing.assert_close(model(x, t, cond.null()).sample, none)
    assert (model(x, t, cond).sample - none).abs().max() > 1e-3


def test_masked_words_do_not_matter() -> None:
    model, (x, t, cond) = build(), batch()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    noisy = torch.where(mask[:, :, None], cond.text, torch.tensor(50.0))
    one, other = (
        Conditioning(text=text, text_mask=mask, size=cond.size) for text in (cond.text, noisy)
    )
    assert torch.equal(model(x, t, one).sample, model(x, t, other).sample)


def test_classes_are_a_token_and_null_is_the_last() -> None:
    model, (x, t, _) = build(num_classes=4, text_size=0, reads_size=False), batch()
    null = model(x, t, Conditioning(labels=torch.full((3,), -1))).sample
    torch.testing.assert_close(model(x, t, Conditioning()).sample, null)
    one = model(x, t, Conditioning(labels=torch.tensor([0, 1, 2]))).sample
    assert (one - null).abs().flatten(1).amax(1).min() > 1e-3


def test_a_reference_is_stretched_and_its_level_is_a_token() -> None:
    model, (x, t, cond) = build(reference_channels=2), batch()
    assert model.patch.in_features == (2 + 2) * 4
    small = torch.full((3, 2, 2, 4, 6), 0.5)
    plain = model(x, t, Conditioning(size=cond.size)).sample
    whole = model(x, t, Conditioning(size=cond.size, reference=small)).sample
    full = torch.full((3, 2, 2, 8, 12), 0.5)  # a constant stays what it is
    same = model(x, t, Conditioning(size=cond.size, reference=full)).sample
    torch.testing.assert_close(whole, same)
    picture = model(x, t, Conditioning(size=cond.size, reference=small[:, :, 0])).sample
    torch.testing.assert_close(picture, same)
    assert (whole - plain).abs().max() > 1e-3
    levels = Conditioning(size=cond.size, reference=small, reference_level=torch.full((3,), 0.3))
    assert (model(x, t, levels).sample - whole).abs().max() > 1e-3


def test_samples_do_not_see_each_other() -> None:
    model, (x, t, cond) = build(reads_frame_rate=True), batch()
    past = memory([True, False, True])
    whole = model(x, t, cond, past).sample
    for n in range(3):
        row = torch.tensor([n])
        one = model(x[row], t[row], cond.select(row), {k: v[row] for k, v in past.items()}).sample
        torch.testing.assert_close(one[0], whole[n], rtol=1e-4, atol=1e-5)


def test_a_shared_time_is_that_of_all() -> None:
    model, (x, _, cond) = build(), batch()
    t = torch.full((3,), 0.4)
    torch.testing.assert_close(model(x, t[:1], cond).sample, model(x, t, cond).sample)


# switches that must not change numbers


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_give_the_same_gradients(dropout: float) -> None:
    gradients = []
    for recompute in (False, True):
        model = build(dropout=dropout, local_depth=1).train()
        if recompute:
            model.enable_gradient_checkpointing()
        torch.manual_seed(5)
        out = model(*batch(), memory([True] * 3))
        gradients.append(torch.autograd.grad(out.sample.square().mean(), list(model.parameters())))
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_bfloat16_stays_close() -> None:
    model, inputs = build(), batch()
    exact = model(*inputs).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*inputs).sample
    # about thirty layers, each rounding at 2^-9
    assert (rounded.float() - exact).norm() / exact.norm() < 0.04
    x, t, cond = inputs
    whole = model.to(torch.bfloat16)(x.bfloat16(), t, cond).sample
    assert whole.dtype == torch.bfloat16
    assert (whole.float() - exact).norm() / exact.norm() < 0.08


def test_the_whole_model_compiles_into_one_graph() -> None:
    model, (x, t, cond) = build(depth=1, reads_frame_rate=True), batch()
    past = memory([True, False, True])

    def predict(
        x: Tensor, t: Tensor, text: Tensor, rate: Tensor, past: dict[str, Tensor]
    ) -> Tensor:
        return model(x, t, Conditioning(text=text, frame_rate=rate), past).sample

    torch._dynamo.reset()
    compiled = torch.compile(predict, fullgraph=True, backend="eager")
    inputs = (x, t, cond.text, cond.frame_rate, past)
    torch.testing.assert_close(compiled(*inputs), predict(*inputs))


def test_a_model_built_on_the_meta_device_can_be_started_later() -> None:
    model = on_meta(**TINY, text_null_token=True, output_conv=True).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_initial_laws() -> None:
    torch.manual_seed(0)
    state = FIT(
        **{**TINY, "patch_width": 96, "latent_width": 64, "patch_head_size": 8}
    ).state_dict()
    # uniform within 1 / sqrt(width), times 1 / sqrt(3)
    for name, width in (
        ("blocks.0.write.q.weight", 96),
        ("blocks.0.global_layers.0.mlp.up.bias", 64),
    ):
        assert 0.97 * (3 * width) ** -0.5 < state[name].abs().max() <= (3 * width) ** -0.5
    # embeddings of numbers keep torch's law
    assert state["context.time.linear_1.weight"].abs().max() > 0.97 * 17**-0.5
    assert state["latents"].std().item() == pytest.approx(0.02, rel=0.15)
    assert state["positions.table"].std().item() == pytest.approx(0.02, rel=0.1)
    assert not state["past.norm.weight"].any()
    assert (state["blocks.0.read.context_norm.weight"] == 1).all()


def test_saving_and_loading_keep_settings_and_numbers(tmp_path: Path) -> None:
    extra = [{"kernel": (1, 2, 2), "mode": "nearest"}]
    model = build(extra_inputs=extra, heads={"read": (2, 3)})
    model.save_pretrained(tmp_path)
    loaded = FIT.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    assert type(model.config["input_size"]) is list
    assert torch.equal(loaded.eval()(*batch()).sample, model(*batch()).sample)


def test_block_classes_name_the_blocks() -> None:
    names = [type(module).__name__ for module in build(local_depth=1).modules()]
    # two, and the last of local layers alone
    assert [name for name in names if name in FIT.block_classes] == [FITBlock.__name__] * 3


def test_it_learns_to_tell_what_it_was_told() -> None:
    """The frame rate is to be painted: no pixel tells it."""
    torch.manual_seed(0)
    model = FIT(
        **{**TINY, "dropout": 0.0, "text_size": 0, "reads_size": False}, reads_frame_rate=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(80):
        numbers = torch.Generator().manual_seed(step)
        rate = torch.where(torch.rand(8, generator=numbers) < 0.5, 8.0, math.inf)
        x, t = torch.randn(8, 2, 2, 8, 12, generator=numbers), torch.zeros(8)
        wanted = torch.isinf(rate).float().view(-1, 1, 1, 1, 1).expand_as(x)
        loss = (model(x, t, Conditioning(frame_rate=rate)).sample - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.1  # 0.25 without the token


# mistakes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"input_size": (2, 10, 12)}, "height must be a multiple of patch times group, but is 10, "
         "with model.patch_size 2 and model.group_size 2 along it. Give a multiple of 4"),
        ({"input_size": (2, 8)}, "frames must be a multiple .* but is 1"),
        ({"input_size": (2, 8, 12, 1)}, "model.input_size has 4 entries"),
        ({"num_latents": 6}, "model.num_latents is 6, which the clip's 4 groups cannot share out"),
        ({"patch_size": (2, 2)}, r"model.patch_size must be three positive numbers.* is \[2, 2\]"),
        ({"patch_head_size": 5}, "model.patch_head_size is 5, which does not divide the width 12"),
        ({"heads": {"raed": [1, 2]}}, r"model.heads gives .*Did you mean 'read'"),
        ({"dropout": 1.0}, r"model.dropout=1.0 must lie in \[0, 1\)"),
        ({"arch": "fit"}, "model.arch must be one of snap, fit_original"),
        ({"depth": 0}, "model.depth must be an integer of at least 1, but is 0"),
        ({"extra_inputs": [{"kernel": [2, 2]}]}, "model.extra_inputs holds entries"),
        ({"text_size": -1}, "model.text_size=-1"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        on_meta(**{**TINY, **changes})


def test_inputs_that_do_not_fit_are_refused() -> None:
    model, (x, t, cond) = build(), batch()
    with pytest.raises(ValueError, match="FIT takes x of shape"):
        model(x[:, :1], t, cond)
    with pytest.raises(ValueError, match="width must be a multiple of patch times group, but is 9"):
        model(x[..., :9], t, cond)
    with pytest.raises(ConfigError, match="which the clip's 6 groups cannot share out"):
        model(torch.randn(3, 2, 2, 12, 12), t, cond)
    with pytest.raises(ValueError, match=r"t must have shape \(3,\)"):
        model(x, t[:2], cond)
    with pytest.raises(ValueError, match=r"cond.frame_rate must have shape \(3,\)"):
        model(x, t, Conditioning(frame_rate=torch.ones(2)))
    with pytest.raises(ValueError, match=r"cond.text must have shape \(3, N, 5\)"):
        model(x, t, Conditioning(text=torch.randn(3, 3, 4)))
    wrong = {"latents": torch.zeros(3, 8, 15), "known": torch.ones(3).bool()}
    with pytest.raises(ValueError, match="memory must hold latents"):
        model(x, t, cond, wrong)
    with pytest.raises(ValueError, match=r"cond.reference must have shape \(3, 2, \[T,\] H, W\)"):
        build(reference_channels=2)(x, t, Conditioning(reference=torch.zeros(3, 1, 4, 4)))
    with pytest.raises(ValueError, match="must be a multiple of the windows"):
        build(extra_inputs=[{"kernel": [1, 3, 3]}])(x, t, cond)
