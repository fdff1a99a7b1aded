"""The block-causal video transformer: the contract, its causality, its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from genscale.backbones.base import parameter_count
from genscale.backbones.causal_video import CausalVideo
from genscale.backbones.causal_video_block import CausalVideoBlock
from genscale.cli.resolvers import register_resolvers
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"
TINY: dict[str, Any] = {
    "input_size": [8, 8, 8],
    "in_channels": 2,
    "num_classes": 3,
    "patch_size": 4,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "mlp_size": 32,
    "frequency_size": 16,
    "text_size": 5,
    "num_text_tokens": 4,
    "block_size": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "text and classes": {},
    "text": {"num_classes": 0},
    "classes": {"text_size": 0},
    "unconditional": {"num_classes": 0, "text_size": 0},
    "padding, no norms": {"attend_padding": True, "qk_norm": False, "text_norm": False},
    "first frame alone": {"independent_first_frame": True, "input_size": [7, 8, 8]},
    "window": {"window": 4, "sink": 1},
}


def build(seed: int = 0, **changes: Any) -> CausalVideo:
    """A tiny model whose weights are all random, so that nothing is at its silent start."""
    torch.manual_seed(seed)
    model: CausalVideo = CausalVideo(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def clip(model: CausalVideo, seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *model.sample_shape, generator=generator)


def condition(model: CausalVideo) -> Conditioning:
    generator = torch.Generator().manual_seed(7)
    size = model.config["text_size"]
    text = torch.randn(2, 3, size, generator=generator) if size else None
    mask = torch.tensor([[True, True, True], [True, False, False]]) if size else None
    labels = torch.tensor([1, -1]) if model.num_classes else None
    return Conditioning(labels=labels, text=text, text_mask=mask)


def times(model: CausalVideo) -> Tensor:
    blocks = torch.arange(model.trained_frames) // model.block_size
    return torch.stack((100.0 + 200.0 * blocks, 900.0 - 50.0 * blocks))


# the contract


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_predicts_and_differentiates(name: str) -> None:
    model = build(**VARIANTS[name]).train()
    x = clip(model)
    output = model(x, times(model), condition(model))
    assert output.sample.shape == x.shape
    assert output.memory is None
    output.sample.square().mean().backward()
    # every parameter takes part, or data-parallel training would wait for its gradient
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_fresh_model_predicts_zero() -> None:
    model = CausalVideo(**TINY)
    assert not model(clip(model), torch.zeros(1), condition(model)).sample.any()


@pytest.mark.parametrize("name", ["text and classes", "padding, no norms"])
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    model = build(**VARIANTS[name])
    x, t, cond = clip(model), times(model), condition(model)
    alone = model(x[1:], t[1:], cond.select(torch.tensor([1]))).sample
    torch.testing.assert_close(model(x, t, cond).sample[1:], alone, rtol=1e-4, atol=1e-5)


def test_times_may_be_shared_by_samples_and_by_frames() -> None:
    model = build()
    x, cond = clip(model), condition(model)
    expected = model(x, torch.full((2, 8), 300.0), cond).sample
    for shape in [(1,), (2,), (1, 8)]:
        torch.testing.assert_close(model(x, torch.full(shape, 300.0), cond).sample, expected)
    by_frame = torch.full((1, 8), 300.0)
    by_frame[:, 6:] = 10.0
    found = model(x, by_frame, cond).sample
    torch.testing.assert_close(found[:, :, :6], expected[:, :, :6])
    assert not torch.allclose(found[:, :, 6:], expected[:, :, 6:])


def test_a_thousand_levels_stay_apart_in_a_model_of_half_precision() -> None:
    model = build().bfloat16()
    t = torch.tensor([[900.0], [901.0]])  # the same number in bfloat16
    one, two = model.time_embed.embed(t).float()
    assert not torch.equal(one, two)


# causality


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_see_their_own_frames_and_earlier_ones(name: str) -> None:
    model = build(**VARIANTS[name])
    x, t, cond = clip(model), times(model), condition(model)
    x.requires_grad_(True)
    model(x, t, cond).sample[:, :, 4].sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
    frames = torch.arange(model.trained_frames)
    end = 5 if model.independent_first_frame else 6
    # two layers look through two windows
    first = 0 if name != "window" else max(0, end - 2 * 3)
    assert torch.equal(seen, (frames < end) & (frames >= first))


def test_noisy_blocks_see_finished_ones_before_them_and_no_other_noisy_one() -> None:
    model = build()
    x, clean = clip(model).requires_grad_(True), clip(model, 1).requires_grad_(True)
    model(x, times(model), condition(model), clean=clean).sample[:, :, 4].sum().backward()
    assert x.grad is not None
    assert clean.grad is not None
    frames = torch.arange(8)
    assert torch.equal(x.grad.abs().amax((0, 1, 3, 4)) > 0, (frames >= 4) & (frames < 6))
    assert torch.equal(clean.grad.abs().amax((0, 1, 3, 4)) > 0, frames < 4)


def test_the_time_of_the_finished_frames_is_zero_unless_given() -> None:
    model = build()
    x, t, cond, clean = clip(model), times(model), condition(model), clip(model, 1)
    plain = model(x, t, cond, clean=clean).sample
    zeros = model(x, t, cond, clean=clean, clean_t=torch.zeros(2, 8)).sample
    torch.testing.assert_close(plain, zeros)
    later = model(x, t, cond, clean=clean, clean_t=torch.full((1,), 50.0)).sample
    torch.testing.assert_close(later[:, :, :2], plain[:, :, :2])  # nothing before the first block
    assert not torch.allclose(later[:, :, 2:], plain[:, :, 2:])


# conditions


def test_padding_counts_where_it_was_trained_to() -> None:
    cond = condition(build())
    x, t = clip(build()), torch.zeros(1)
    longer = Conditioning(
        labels=cond.labels,
        text=torch.cat((cond.text, torch.zeros(2, 1, 5)), dim=1),  # type: ignore[list-item]
        text_mask=torch.cat((cond.text_mask, torch.zeros(2, 1).bool()), dim=1),  # type: ignore[list-item]
    )
    for attends in (False, True):
        model = build(attend_padding=attends)
        torch.testing.assert_close(model(x, t, cond).sample, model(x, t, longer).sample)
    one, two = (build(attend_padding=attends)(x, t, cond).sample for attends in (False, True))
    assert not torch.allclose(one, two)


def test_missing_conditions_are_null_ones() -> None:
    model = build()
    x, t, cond = clip(model), torch.zeros(1), condition(model)
    null = model(x, t, cond.null()).sample
    torch.testing.assert_close(model(x, t, Conditioning()).sample, null)
    assert not torch.allclose(model(x, t, cond).sample, null)


# switches that must not change numbers


def test_recomputed_blocks_give_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        model = build(checkpoint_blocks=recompute).train()
        loss = model(clip(model), times(model), condition(model)).sample.square().mean()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_bfloat16_stays_close() -> None:
    model = build()
    x, t, cond = clip(model), times(model), condition(model)
    exact = model(x, t, cond).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x, t, cond).sample
    # about twenty layers, each rounding at 2^-9
    assert (rounded.float() - exact).norm() / exact.norm() < 0.04


def test_saving_and_loading_keep_settings_and_numbers(tmp_path: Path) -> None:
    model = build(input_size=OmegaConf.create([4, 8, 8]))
    assert type(model.config["input_size"]) is list
    model.save_pretrained(tmp_path)
    loaded = CausalVideo.from_pretrained(tmp_path).eval()
    x, t, cond = clip(model), times(model), condition(model)
    assert torch.equal(loaded(x, t, cond).sample, model(x, t, cond).sample)


def test_a_model_built_on_the_meta_device_can_be_started_later() -> None:
    with torch.device("meta"):
        model = CausalVideo(**TINY)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_block_classes_name_the_blocks() -> None:
    names = [type(module).__name__ for module in build().modules()]
    assert names.count(CausalVideoBlock.__name__) == 2
    assert CausalVideo.block_classes == (CausalVideoBlock.__name__,)


# sizes


def published(name: str) -> CausalVideo:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"model={name}"])
    arguments: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore
    assert arguments.pop("_target_") == "genscale.backbones.causal_video.CausalVideo"
    with torch.device("meta"):
        return CausalVideo(**arguments)


def test_sizes() -> None:
    # 1,418,996,800: what the shapes of the released file add up to (its published layout)
    assert parameter_count(published("causal_wan_1_3b")) == 1_418_996_800
    small = published("causal_video")
    assert small.sample_shape == (3, 8, 32, 32)
    assert parameter_count(small) == 2_281_584  # no outside reference, pinned here


# mistakes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"input_size": [9, 8, 8]}, "model.input_size has 9 frames. Frames must be a multiple of"),
        ({"input_size": [8, 8]}, r"must be \[frames, height, width\] with sides that are multipl"),
        ({"input_size": [8, 9, 8]}, "multiples of model.patch_size=4, but is"),
        ({"hidden_size": 10}, "even number of channels, 6 at least, .* give 5"),
        ({"hidden_size": 25}, "model.hidden_size is 25, which model.num_heads=2 heads do not"),
        ({"cache": "rollin"}, "model.cache must be one of .* Did you mean 'rolling'"),
        ({"positions": "none"}, "model.positions must be one of auto, absolute, relative"),
        ({"window": 3, "sink": 2}, "model.window of 3 frames has no room for model.sink=2 and a"),
        ({"cache": "rolling", "cache_window": 1}, "model.cache_window of 1 frames has no room"),
        ({"cache": "semantic", "sink": 1}, "model.sink=1 ends inside one of 2 frames"),
        ({"frequency_size": 15}, "model.frequency_size must be even"),
        ({"bank_share": 0.0}, r"model.bank_share must lie in \(0, 1\], but is 0.0"),
        ({"text_size": -1}, "model.text_size=-1 .* must be positive"),
        ({"depth": 0}, "model.depth must be an integer of at least 1, but is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        CausalVideo(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x": torch.zeros(2, 2, 7, 8, 8)}, "Frames must be a multiple of 2, .* but 7 were given"),
        ({"x": torch.zeros(2, 2, 8, 9, 8)}, "multiples of 4, the patch, but x is 9 x 8"),
        ({"x": torch.zeros(2, 2, 8, 8)}, r"CausalVideo takes x of shape \(B, 2, F, H, W\)"),
        ({"t": torch.zeros(2, 7)}, r"t must have shape \(2,\) or \(1,\), .* but has \(2, 7\)"),
        ({"cond": Conditioning(labels=torch.zeros(3).long())}, r"cond.labels must have shape \(2,"),
        ({"cond": Conditioning(text=torch.zeros(2, 9, 5))}, r"N up to 4, but has \(2, 9, 5\)"),
        ({"clean": torch.zeros(2, 2, 6, 8, 8)}, "Finished frames come either as clean, of x's"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    given = {"x": torch.zeros(2, 2, 8, 8, 8), "t": torch.zeros(2), "cond": Conditioning()}
    with pytest.raises(ValueError, match=sentence):
        build()(**{**given, **changes})
