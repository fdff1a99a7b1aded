"""RIN: what it computes, what it remembers and what it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.rin import RIN, PlaceEmbedding, RINBlock, TapeAttention
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.io.converters.rin import to_official
from tests.backbones import plain_fit

TINY: dict[str, Any] = {
    "input_size": 8,
    "in_channels": 2,
    "patch_size": 2,
    "tape_width": 12,
    "latent_width": 16,
    "num_latents": 5,
    "depth": 2,
    "compute_depth": 1,
    "num_heads": 2,
    "head_size": 4,
}
# what the third party's program builds
THEIRS: dict[str, Any] = {
    "reference_channels": 2,
    "positions": "mlp",
    "tape_conv": True,
    "latent_norm": True,
}


def build(**changes: Any) -> RIN:
    """A tiny model whose weights are all random, so that nothing is at its silent start."""
    torch.manual_seed(0)
    model: RIN = RIN(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def batch(*size: int) -> tuple[Tensor, Tensor, Conditioning]:
    numbers = torch.Generator().manual_seed(1)
    cond = Conditioning(
        labels=torch.tensor([0, 3, -1]), reference=torch.randn(3, 2, 8, 8, generator=numbers)
    )
    x = torch.randn(3, 2, *(size or (8, 8)), generator=numbers)
    return x, torch.tensor([0.1, 0.4, 0.9]), cond


def memory(known: list[bool]) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(2)
    return {"latents": torch.randn(3, 5, 16, generator=numbers), "known": torch.tensor(known)}


@pytest.mark.parametrize("condition", ["token", "adaln"])
@pytest.mark.parametrize("tape_attention", [False, True])
@pytest.mark.parametrize("patch_norm", ["both", "none"])
def test_it_is_what_the_formulas_say(condition: str, tape_attention: bool, patch_norm: str) -> None:
    model = build(
        **THEIRS, condition=condition, tape_attention=tape_attention, patch_norm=patch_norm
    )
    x, t, cond = batch()
    past = memory([True, False, True])
    out = model(x, t, cond, past)
    state = {k: v.detach() for k, v in to_official(model.state_dict(), model.config).items()}
    config = {
        "image_size": 8,
        "patch_size": 2,
        "depth": 2,
        "latent_self_attn_depth": 1,
        "num_latents": 5,
        "heads": 2,
        "latent_token_time_cond": condition == "token",
        "dual_patchnorm": patch_norm == "both",
        "patches_self_attn": tape_attention,
    }
    for n in range(3):
        before = past["latents"][n] if past["known"][n] else None
        sample, latents = plain_fit.rin(state, config, x[n], t[n], cond.reference[n], before)  # type: ignore[index]
        torch.testing.assert_close(out.sample[n], sample, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(out.memory["latents"][n], latents, rtol=1e-4, atol=2e-5)


def test_memory_follows_the_protocol() -> None:
    model, (x, t, cond) = build(), batch()
    none = model(x, t, cond)
    assert none.memory["known"].tolist() == [True] * 3
    assert none.memory["latents"].shape == (3, 5, 16)  # without the tokens beside them
    assert torch.equal(model(x, t, cond, memory([False] * 3)).sample, none.sample)
    some = model(x, t, cond, memory([True, False, True])).sample
    torch.testing.assert_close(some[1], none.sample[1], rtol=1e-5, atol=1e-6)
    assert (some - none.sample)[[0, 2]].abs().max() > 1e-3
    assert RIN.self_conditioning


@pytest.mark.parametrize("condition", ["token", "adaln"])
def test_classes_and_text_are_read(condition: str) -> None:
    model = build(num_classes=4, text_size=3, num_text_tokens=2, condition=condition)
    x, t, _ = batch()
    text = torch.randn(3, 2, 3)
    none = model(x, t, Conditioning()).sample
    null = Conditioning(labels=torch.full((3,), -1), text=text, text_mask=torch.zeros(3, 2).bool())
    torch.testing.assert_close(model(x, t, null).sample, none)
    for cond in (Conditioning(labels=torch.tensor([0, 1, 2])), Conditioning(text=text)):
        assert (model(x, t, cond).sample - none).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["learned", "mlp"])
def test_clips_are_taken_and_pictures_are_clips_of_equal_frames(positions: str) -> None:
    model = build(input_size=(2, 8, 8), patch_size=(1, 2, 2), positions=positions, tape_conv=True)
    assert model.sample_shape == (2, 2, 8, 8)
    x, t, cond = batch(2, 8, 8)
    assert model(x, t, cond).sample.shape == x.shape
    picture = x[:, :, 0]
    clip = picture[:, :, None].expand(-1, -1, 2, -1, -1)
    torch.testing.assert_close(model(picture, t, cond).sample, model(clip, t, cond).sample.mean(2))
    other = torch.randn(3, 2, 2, 12, 8)  # and other sizes
    assert model(other, t, cond).sample.shape == other.shape


def test_the_cost_of_a_block_is_that_of_its_latents() -> None:
    def flops(**changes: Any) -> int:
        with torch.device("meta"):
            return RIN(**{**TINY, **changes}).flops()

    assert flops(num_latents=10) < 2 * flops()
    # no patch attends to another: four times the patches are at most four times the work
    assert flops(input_size=16) < 4 * flops()


def test_samples_do_not_see_each_other() -> None:
    model, (x, t, cond) = build(**THEIRS, condition="adaln"), batch()
    whole = model(x, t, cond).sample
    for n in range(3):
        row = torch.tensor([n])
        one = model(x[row], t[row], cond.select(row)).sample
        torch.testing.assert_close(one[0], whole[n], rtol=1e-4, atol=1e-5)


def test_a_fresh_model_is_not_modulated_and_ignores_its_past() -> None:
    torch.manual_seed(0)
    model: RIN = RIN(**TINY, condition="adaln").eval()
    x, t, cond = batch()
    assert torch.equal(model(x, t, cond).sample, model(x, t + 1, cond).sample)
    assert torch.equal(model(x, t, cond).sample, model(x, t, cond, memory([True] * 3)).sample)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = build(checkpoint_blocks=recompute, tape_attention=True, qk_norm=True).train()
        loss = model(*batch(), memory([True] * 3)).sample.square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_bfloat16_stays_close() -> None:
    model, inputs = build(**THEIRS, tape_attention=True), batch()
    exact = model(*inputs).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*inputs).sample
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05
    x, t, cond = inputs
    whole = model.to(torch.bfloat16)(x.bfloat16(), t, Conditioning(labels=cond.labels)).sample
    assert whole.dtype == torch.bfloat16


def test_linear_attention_of_equal_patches_reads_the_mean() -> None:
    torch.manual_seed(0)
    layer = TapeAttention(6, 2, 3, 0)
    x = torch.randn(1, 1, 6).expand(1, 7, 6)
    out = layer(x, None)
    torch.testing.assert_close(out, out[:, :1].expand_as(out))
    # as one patch alone: softmax over places averages equal values
    torch.testing.assert_close(out[:, :1], layer(x[:, :1], None))


def test_places_run_from_zero_to_one() -> None:
    embed = PlaceEmbedding(8)
    ends = embed(2)
    torch.testing.assert_close(embed(5)[[0, -1]], ends)


def test_saving_and_loading_keep_settings_and_numbers(tmp_path: Path) -> None:
    model = build(input_size=(2, 8, 8), patch_size=(1, 2, 2))
    model.save_pretrained(tmp_path)
    loaded = RIN.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    inputs = batch(2, 8, 8)
    assert torch.equal(loaded.eval()(*inputs).sample, model(*inputs).sample)


def test_block_classes_name_the_blocks() -> None:
    names = [type(module).__name__ for module in build().modules()]
    assert [name for name in names if name in RIN.block_classes] == [RINBlock.__name__] * 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"input_size": 9}, r"must be multiples of the patch \(1, 2, 2\), but are \(1, 9, 9\)"),
        ({"patch_size": (2, 2)}, "model.patch_size must be a positive number, or three"),
        ({"condition": "film"}, "model.condition must be one of token, adaln"),
        ({"positions": "fixed"}, "model.positions must be one of learned, mlp"),
        ({"num_heads": 0}, "model.num_heads must be an integer of at least 1, but is 0"),
        ({"reference_channels": -1}, "model.reference_channels must be 0 or more, but is -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        RIN(**{**TINY, **changes})


def test_inputs_that_do_not_fit_are_refused() -> None:
    model, (x, t, cond) = build(text_size=3), batch()
    with pytest.raises(ValueError, match="RIN takes x of shape"):
        model(x[:, :1], t, cond)
    with pytest.raises(ValueError, match="must be multiples of the patch"):
        model(x[..., :7], t, cond)
    with pytest.raises(ValueError, match=r"cond.text must have shape \(3, N, 3\)"):
        model(x, t, Conditioning(text=torch.randn(3, 3, 4)))
