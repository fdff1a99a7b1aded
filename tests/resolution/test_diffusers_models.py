"""Whole models of diffusers: which factor each layer gets, and that nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor

from genscale.resolution import apply_resolution
from genscale.resolution.entropy import ResolutionState, entropy_factor


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seen: list[float] = []
    plain = ResolutionState.factor

    def note(state: ResolutionState, tokens: int, extras: int | None = None) -> float:
        seen.append(plain(state, tokens, extras))
        return seen[-1]

    monkeypatch.setattr(ResolutionState, "factor", note)
    return seen


def test_layers_of_a_unet_have_factors_of_their_own_counts(factors: list[float]) -> None:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=8,
    ).eval()
    args = (sample(1, 4, 16, 16), torch.tensor([3]), sample(1, 5, 16))
    with torch.no_grad():
        plain = model(*args).sample
        with apply_resolution(model, native=(8, 8), target=(16, 16)):
            scaled = model(*args).sample
        assert torch.equal(model(*args).sample, plain)
    outer, middle = entropy_factor(256, 64), entropy_factor(64, 16)
    assert factors == pytest.approx([outer, middle, outer, outer])  # words: none at all
    assert not torch.allclose(scaled, plain, atol=1e-4)


def test_all_layers_of_flux_count_its_words(factors: list[float]) -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    inputs = {
        "hidden_states": sample(1, 64, 4),
        "encoder_hidden_states": sample(1, 5, 32),
        "pooled_projections": sample(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": sample(64, 3).abs() * 4,
        "txt_ids": torch.zeros(5, 3),
    }
    with torch.no_grad():
        plain = model(**inputs).sample
        with apply_resolution(model, "ntk", native=(8, 8), target=(16, 16)):
            scaled = model(**inputs).sample
        assert torch.equal(model(**inputs).sample, plain)
    assert factors == pytest.approx([entropy_factor(69, 21)] * 2)  # 64 + 5 now, 16 + 5 in training
    assert not torch.allclose(scaled, plain, atol=1e-4)
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert hooks == []
