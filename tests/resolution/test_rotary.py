"""Scaled rotary frequencies against their definitions, and on the tables of models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn

from genscale.backbones.causal_video import CausalVideo
from genscale.backbones.switti import Switti
from genscale.errors import ConfigError
from genscale.layers.rope import AxialRoPE, axial_positions
from genscale.layers.rope3d import VideoRoPE
from genscale.layers.scale_rope import ScaleRoPE
from genscale.resolution import RotaryScaling, apply_resolution
from genscale.resolution.rotary import (
    axis_angles,
    axis_frequencies,
    centred_places,
    grid_angles,
    stretched_log_frequencies,
    yarn_logit_factor,
)


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def base(channels: int = 16, theta: float = 10000.0) -> Tensor:
    return theta ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def test_each_variant_is_its_formula() -> None:
    omega = base()
    torch.testing.assert_close(axis_frequencies(16, scale=3.0), omega)
    torch.testing.assert_close(axis_frequencies(16, scale=3.0, variant="pi"), omega / 3)
    torch.testing.assert_close(axis_frequencies(16, scale=3.0, variant="ntk"), base(16, 3e4))
    ten = axis_frequencies(16, scale=3.0, variant="ntk", ntk=10.0)
    torch.testing.assert_close(ten, base(16, 1e5))
    exact = axis_frequencies(16, scale=3.0, variant="ntk_exact")
    assert exact[0] == omega[0]
    torch.testing.assert_close(exact[-1], omega[-1] / 3)
    clip = axis_frequencies(16, scale=3.0, variant="ntk_clip", ntk=10.0)
    torch.testing.assert_close(clip, torch.maximum(base(16, 1e5), omega / 3))
    assert (clip > ten).any()


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones() -> None:
    omega = base()
    got = axis_frequencies(16, scale=2.0, variant="yarn", trained_cells=1024)
    turns = 1024 * omega / (2 * math.pi)
    torch.testing.assert_close(got[turns >= 32], omega[turns >= 32])
    torch.testing.assert_close(got[turns <= 1], omega[turns <= 1] / 2)
    between = (turns > 1) & (turns < 32)
    assert between.any()
    assert ((got < omega) & (got > omega / 2))[between].all()
    assert yarn_logit_factor(1.0) == yarn_logit_factor(0.5) == 1.0
    assert yarn_logit_factor(math.e) == pytest.approx(1.1**2)


@pytest.mark.parametrize("variant", ["pi", "ntk", "ntk_exact", "ntk_clip", "yarn", "unscaled"])
def test_nothing_changes_at_the_trained_size(variant: str) -> None:
    torch.testing.assert_close(axis_frequencies(16, variant=variant), base())


def test_the_time_decides_between_layout_and_detail() -> None:
    def at(time: float) -> Tensor:
        return axis_frequencies(16, scale=2.0, variant="time_aware", time=time)

    torch.testing.assert_close(at(0.29), base() / 2)
    torch.testing.assert_close(at(0.3), base(16, 2e4))
    with pytest.raises(ConfigError, match="follow the time"):
        axis_frequencies(16, variant="time_aware")
    with pytest.raises(ConfigError, match="Did you mean 'ntk_exact'"):
        axis_frequencies(16, variant="ntk_exct")


def test_rows_come_before_columns_or_alternate_with_them() -> None:
    omega = base(8)
    rows, columns = torch.arange(3), torch.arange(2)
    joined = grid_angles(rows, columns, omega)
    assert joined.shape == (3, 2, 8)
    torch.testing.assert_close(joined[2, 1], torch.cat((2 * omega, omega)))
    turns = grid_angles(rows, columns, omega, alternate=True)
    torch.testing.assert_close(turns[2, 1, 0::2], 2 * omega)
    torch.testing.assert_close(turns[2, 1, 1::2], omega)
    torch.testing.assert_close(axis_angles(rows, omega)[2], 2 * omega)


def test_recentred_places_have_the_trained_range_in_the_middle() -> None:
    assert centred_places(8, 4).tolist() == [-2, -1, 0, 1, 2, 3, 4, 5]


def ids() -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    image = torch.stack((torch.zeros(4, 6), rows, columns), dim=-1).flatten(0, 1)
    return torch.cat((torch.zeros(2, 3), image))


def test_the_table_of_flux_is_replaced_and_comes_back() -> None:
    layer = FluxPosEmbed(theta=10000, axes_dim=[4, 6, 6])
    model, plain = Holder(layer), layer(ids())
    with apply_resolution(
        model, [RotaryScaling("unscaled")], native=(2, 2), target=(4, 4)
    ):  # the trained frequencies: our table is theirs
        for got, expected in zip(layer(ids()), plain, strict=True):
            torch.testing.assert_close(got, expected)
    wider = FluxPosEmbed(theta=20000, axes_dim=[4, 6, 6])(ids())
    with apply_resolution(model, [RotaryScaling("ntk")], native=(2, 2), target=(4, 4)):
        for got, expected in zip(layer(ids()), wider, strict=True):
            torch.testing.assert_close(got, expected)
    assert torch.equal(layer(ids())[0], plain[0])
    halved = layer(ids() / 2)
    op = RotaryScaling("time_aware")
    with apply_resolution(model, [op], native=(2, 2), target=(4, 4)) as scaled:
        scaled.pre_step(torch.zeros(1), 0.9, 0)  # nearly all noise
        torch.testing.assert_close(layer(ids())[1], halved[1])
        scaled.pre_step(torch.zeros(1), torch.tensor([0.5]), 1)
        torch.testing.assert_close(layer(ids())[1], wider[1])


def test_learned_frequencies_keep_the_angle_of_a_cell_where_they_are_fast() -> None:
    rope = AxialRoPE(16, 1)
    slow, fast = rope.freqs_h[0, 0].item(), rope.freqs_h[0, -1].item()
    stretched = stretched_log_frequencies(rope.freqs_h.detach(), 2.0)
    assert stretched[0, 0].item() == pytest.approx(slow)
    assert stretched[0, -1].item() == pytest.approx(fast + math.log(2))
    model, places = Holder(rope), axial_positions(4, 4)
    plain = rope.rotation(places, 1)
    with torch.no_grad():
        for variant, factor in (("pi", 1.0), ("unscaled", 2.0)):
            op = RotaryScaling(variant)
            with apply_resolution(model, [op], native=(2, 2), target=(4, 4)):
                got = rope.rotation(places, 1)
            for a, b in zip(got, rope.rotation(factor * places, 1), strict=True):
                torch.testing.assert_close(a, b)
        with apply_resolution(model, [RotaryScaling()], native=(2, 2), target=(4, 4)):
            assert not torch.allclose(rope.rotation(places)[0], plain[0][:, 1:])
        assert torch.equal(rope.rotation(places, 1)[0], plain[0])


def test_rows_and_columns_of_a_video_are_scaled_and_its_time_is_not() -> None:
    video: dict[str, Any] = {"input_size": (3, 4, 4), "hidden_size": 48, "depth": 1, "num_heads": 2}
    model = CausalVideo(**video, mlp_size=48, patch_size=1)
    rope, cpu = model.rope, torch.device("cpu")
    assert isinstance(rope, VideoRoPE)
    plain = [rope.frequencies(axis, cpu) for axis in range(3)]
    for variant in ("pi", "ntk", "yarn"):
        with apply_resolution(model, [RotaryScaling(variant)], target=(8, 8)):
            frames, *sides = (rope.frequencies(axis, cpu) for axis in range(3))
        assert torch.equal(frames, plain[0])
        expected = axis_frequencies(8, scale=2.0, variant=variant, trained_cells=4)
        assert torch.equal(sides[0], expected)
        assert torch.equal(sides[1], expected)
    assert torch.equal(rope.frequencies(1, cpu), plain[1])
    # places that are interpolated already are as close as pi would bring them
    model = CausalVideo(**video, mlp_size=48, patch_size=1, position_resize="interpolate")
    with apply_resolution(model, [RotaryScaling("pi")], target=(8, 8)):
        torch.testing.assert_close(model.rope.frequencies(2, cpu), plain[2])


def test_scales_keep_the_angle_of_a_cell_where_it_is_fast() -> None:
    model = Switti(scales=[1, 2, 4], hidden_size=32, depth=1, num_heads=2)
    rope, cpu = model.rotary, torch.device("cpu")
    assert isinstance(rope, ScaleRoPE)
    trained, finer = (rope.cell_angles(2, 0, count, cpu) for count in (4, 7))
    torch.testing.assert_close(finer, trained / 2)  # a scale spans as much as ever: pi
    for variant, expected in (("pi", finer), ("unscaled", trained)):
        with apply_resolution(model, [RotaryScaling(variant)], native=(4, 4), target=(7, 7)):
            torch.testing.assert_close(rope.cell_angles(2, 0, 7, cpu), expected)
    with apply_resolution(model, [RotaryScaling("ntk")], native=(4, 4), target=(7, 7)):
        between = rope.cell_angles(2, 0, 7, cpu)
        torch.testing.assert_close(rope.cell_angles(2, 0, 4, cpu), trained)  # as in training
        copy = model.at_scales([1, 3, 7])
        assert isinstance(copy, Switti)
        assert copy.rotary is rope  # what samples at another size turns by it too
    torch.testing.assert_close(between[0], trained[0])
    torch.testing.assert_close(between[-1], finer[-1])
    assert ((between > finer) & (between < trained))[1:-1].all()
    assert torch.equal(rope.cell_angles(2, 0, 7, cpu), finer)


def test_a_model_without_rotary_positions_is_refused() -> None:
    model = Holder(nn.Linear(2, 2))
    op = RotaryScaling()
    with (
        pytest.raises(ConfigError, match="no rotary positions"),
        apply_resolution(model, [op], native=(2, 2), target=(4, 4)),
    ):
        pass
