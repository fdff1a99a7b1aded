"""Whole models of diffusers: which factor each layer gets, and that nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor

from genscale.errors import ConfigError
from genscale.resolution import apply_resolution
from genscale.resolution.entropy import EntropyAttention, ResolutionState, entropy_factor
from genscale.resolution.text_tiles import TextTiles, tiled_words


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FLUX: dict[str, Any] = {
    **{"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16},
    **{"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32},
    "axes_dims_rope": (4, 6, 6),
}


def flux_inputs() -> dict[str, Tensor]:
    return {
        "hidden_states": sample(1, 64, 4),
        "encoder_hidden_states": sample(1, 5, 32),
        "pooled_projections": sample(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": grid_ids(8, 8),
        "txt_ids": torch.zeros(5, 3),
    }


def grid_ids(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1).float()


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
    model = FluxTransformer2DModel(**FLUX).eval()
    inputs = flux_inputs()
    with torch.no_grad():
        plain = model(**inputs).sample
        ops = [EntropyAttention(), TextTiles()]
        with apply_resolution(model, ops, native=(8, 8), target=(16, 16)):
            model(**inputs)
            # 64 cells and 4 tiles of 5 words now, 16 and 5 in training
            assert factors == pytest.approx([entropy_factor(84, 21)] * 2)
            with pytest.raises(ConfigError, match="without the words or their places by name"):
                model(**{**inputs, "img_ids": None})
        factors.clear()
        with apply_resolution(model, "ntk", native=(8, 8), target=(16, 16)):
            scaled = model(**inputs).sample
        assert torch.equal(model(**inputs).sample, plain)
    assert factors == pytest.approx([entropy_factor(69, 21)] * 2)  # 64 + 5 now, 16 + 5 in training
    assert not torch.allclose(scaled, plain, atol=1e-4)
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert hooks == []


def test_words_stand_at_the_corner_of_every_tile() -> None:
    words, ids = sample(2, 5, 3), torch.zeros(5, 3)
    repeated, places = tiled_words(words, ids, (2, 3), (4, 6))
    assert torch.equal(repeated, torch.cat([words] * 6, dim=1))
    corners = [(0.0, 4.0 * row, 6.0 * column) for row in range(2) for column in range(3)]
    assert places[::5].tolist() == [list(corner) for corner in corners]
    assert torch.equal(places, places[::5].repeat_interleave(5, dim=0))


def test_repeated_words_reach_the_network_with_their_places() -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**FLUX).eval()
    seen: list[Tensor] = []
    model.pos_embed.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    inputs = flux_inputs()
    with torch.no_grad():
        plain = model(**inputs).sample
        with apply_resolution(model, [TextTiles()], native=(8, 8), target=(16, 16)):
            tiled = model(**inputs).sample
        assert torch.equal(model(**inputs).sample, plain)
    assert tiled.shape == plain.shape
    assert not torch.allclose(tiled, plain, atol=1e-6)
    assert [len(ids) for ids in seen] == [69, 84, 69]
    assert seen[1][:20:5].tolist() == [[0, 0, 0], [0, 0, 4], [0, 4, 0], [0, 4, 4]]
    op = TextTiles()
    with (
        pytest.raises(ConfigError, match="Linear does not join words"),
        apply_resolution(torch.nn.Linear(2, 2), [op], native=(8, 8), target=(16, 16)),
    ):
        pass
