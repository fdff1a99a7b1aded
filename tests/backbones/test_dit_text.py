"""DiT with text: what it reads, what it ignores, and that models without text are as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from genscale.backbones.base import parameter_count
from genscale.backbones.dit import DiT, PooledText
from genscale.backbones.shapes import check_text
from genscale.cli.resolvers import register_resolvers
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError

TINY: dict[str, Any] = {
    "input_size": 8,
    "in_channels": 2,
    "num_classes": 0,
    "patch_size": 2,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "text_size": 6,
    "num_text_tokens": 4,
    "pooled_text_size": 5,
}


def build(**changes: Any) -> DiT:
    """A tiny model whose weights are all random, so that nothing is at its silent start."""
    torch.manual_seed(0)
    model: DiT = DiT(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs() -> tuple[Tensor, Tensor, Conditioning]:
    cond = Conditioning(
        text=torch.randn(3, 4, 6),
        text_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool(),
        pooled_text=torch.randn(3, 5),
    )
    return torch.randn(3, 2, 8, 8), torch.linspace(0, 999, 3), cond


def test_a_model_without_text_has_the_weights_it_always_had() -> None:
    plain = DiT(**{**TINY, "text_size": 0, "pooled_text_size": 0, "num_classes": 5})
    assert not [key for key in plain.state_dict() if "cross" in key or "pooled" in key]
    both = DiT(**{**TINY, "num_classes": 5})
    added = set(both.state_dict()) - set(plain.state_dict())
    layers = {key.rsplit(".", 1)[0] for key in added}
    attention = {
        f"blocks.{i}.cross_attention.{part}" for i in (0, 1) for part in ("q", "kv", "out")
    }
    assert layers == attention | {"pooled_embed.linear_1", "pooled_embed.linear_2"}


def test_a_fresh_model_predicts_zero_and_text_adds_nothing() -> None:
    torch.manual_seed(0)
    model = DiT(**TINY)
    x, t, cond = inputs()
    assert not model(x, t, cond).sample.any()
    for block in model.blocks:
        assert not block.cross_attention.out.weight.any()


def test_tokens_and_pooled_text_both_matter() -> None:
    model = build()
    x, t, cond = inputs()
    first = model(x, t, cond).sample
    for name in ("text", "pooled_text"):
        changed = {"text": cond.text, "pooled_text": cond.pooled_text}
        changed[name] = torch.randn_like(changed[name])  # type: ignore[arg-type]
        other = model(x, t, Conditioning(text_mask=cond.text_mask, **changed)).sample
        assert float((first - other).detach().abs().max()) > 1e-3, name


def test_masked_tokens_do_not_matter() -> None:
    model = build()
    x, t, cond = inputs()
    assert cond.text is not None
    assert cond.text_mask is not None
    noisy = torch.where(cond.text_mask[:, :, None], cond.text, torch.tensor(50.0))
    other = Conditioning(text=noisy, text_mask=cond.text_mask, pooled_text=cond.pooled_text)
    assert torch.equal(model(x, t, cond).sample, model(x, t, other).sample)


def test_no_text_is_the_null_text() -> None:
    model = build()
    x, t, cond = inputs()
    none, null = model(x, t, Conditioning()).sample, model(x, t, cond.null()).sample
    torch.testing.assert_close(none, null, rtol=0, atol=1e-6)


def test_samples_do_not_see_each_others_text() -> None:
    model = build(depth=1)
    x, t, cond = inputs()
    whole = model(x, t, cond).sample
    for i in range(3):
        row = torch.tensor([i])
        one = model(x[i : i + 1], t[i : i + 1], cond.select(row)).sample
        torch.testing.assert_close(one[0], whole[i], rtol=1e-5, atol=1e-5)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    x, t, cond = inputs()
    gradients = []
    for switch in (False, True):
        model = build(checkpoint_blocks=switch)
        model(x, t, cond).sample.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, gradients[1][name])


def test_operations_of_the_text_are_counted() -> None:
    with_text, without = build(), build(text_size=0, pooled_text_size=0)
    tokens, width = 16, 16
    a_block = 2 * (2 * tokens * width**2 + 4 * 6 * 2 * width + 2 * tokens * 4 * width)
    pooled = 2 * (5 * width + width**2)
    assert with_text.flops() - without.flops() == 2 * a_block + pooled
    assert with_text.example_condition("cpu").text is not None


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = build()
    x, t, cond = inputs()
    with pytest.raises(ValueError, match=r"cond\.text must have shape \(3, N, 6\)"):
        model(x, t, Conditioning(text=torch.randn(3, 4, 7)))
    with pytest.raises(ValueError, match=r"cond\.pooled_text must have shape \(3, 5\)"):
        model(x, t, Conditioning(text=cond.text, pooled_text=torch.randn(3, 4)))
    with pytest.raises(ConfigError, match=r"model\.text_size=-1"):
        DiT(**{**TINY, "text_size": -1})
    with pytest.raises(ConfigError, match=r"model\.num_text_tokens=0"):
        check_text(8, 0, 0)


def test_pooled_text_may_be_missing() -> None:
    layer = PooledText(5, 8)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(layer(None, x), layer(torch.zeros(2, 5), x))


def test_published_layouts_have_no_place_for_text() -> None:
    from genscale.io.converters.dit import diffusers_config, to_official

    model = build(num_classes=5, mlp_ratio=4.0)
    with pytest.raises(ConfigError, match="layouts know no text, but the model has text_size=6"):
        to_official(model.state_dict(), model.config)
    with pytest.raises(ConfigError, match="pooled_text_size=5"):
        diffusers_config(model.config)


def test_the_small_model_has_the_size_that_its_page_tells() -> None:
    register_resolvers()
    conf = Path(__file__).resolve().parents[2] / "conf"
    with initialize_config_dir(str(conf), version_base="1.3"):
        node = compose("train", overrides=["model=dit_text"]).model
    settings = {name: value for name, value in node.items() if name != "_target_"}
    with torch.device("meta"):
        model = DiT(**settings)
    assert parameter_count(model) == 1_445_936
    assert round(model.flops() / 2e9, 2) == 0.06
