"""Guidance by the small picture, and fused scales of attention."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from genscale.errors import ConfigError
from genscale.layers.attention import SelfAttention
from genscale.resolution import apply_resolution
from genscale.resolution.flow_guided import (
    FlowAligned,
    Projection,
    SkipResidual,
    accelerate,
    align,
    as_number,
    cosine_ramp,
    project,
    skip_weight,
    velocity,
)
from genscale.resolution.frequency import butterworth, gaussian_blur, haar_low_pass, low_pass
from genscale.resolution.scale_fusion import (
    ScaleFusion,
    attend_in_windows,
    fuse_scales,
    grid_of,
)


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apply(op, model=None, schedule=None):
    model = model or nn.Identity()
    return apply_resolution(model, [op], native=(4, 4), target=(8, 8), schedule=schedule)


def test_the_guide_rules_at_noise_and_is_gone_at_data() -> None:
    assert [cosine_ramp(share) for share in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [skip_weight(t) for t in (1.0, 0.5, 0.0)] == pytest.approx([1, 0.125, 0])
    assert skip_weight(0.5, 2) == pytest.approx(0.25)
    x, z, eps = (sample(1, 2, 8, 8, seed=seed) for seed in range(3))
    with apply(SkipResidual(z, eps)) as scaled:
        torch.testing.assert_close(scaled.pre_step(x, 1.0, 0), eps)
        torch.testing.assert_close(scaled.pre_step(x, torch.tensor([0.0]), 1), x)
        half = 0.875 * x + 0.125 * (z + eps) / 2
        torch.testing.assert_close(scaled.pre_step(x, 0.5, 1), half)
    with apply(SkipResidual(z, eps), schedule=lambda t: (0.6, 0.8)) as scaled:
        torch.testing.assert_close(scaled.pre_step(x, 1.0, 0), 0.6 * z + 0.8 * eps)
    with pytest.raises(ValueError, match="one time for all samples"):
        as_number(torch.tensor([0.1, 0.2]))


def test_projecting_estimates_is_projecting_velocities() -> None:
    x, x0, z = (sample(1, 2, 8, 8, seed=seed) for seed in range(3))
    t, c = 0.7, 0.3
    v, v_g = velocity(x, x0, t), velocity(x, z, t)
    moved = v + c * (v_g - v) + (1 - c) * (haar_low_pass(v_g) - haar_low_pass(v))
    torch.testing.assert_close(velocity(x, project(x0, z, c), t), moved, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(project(x0, z, 1.0), z)
    torch.testing.assert_close(haar_low_pass(project(x0, z, 0.0)), haar_low_pass(z))


def test_the_projection_ends_with_its_steps() -> None:
    x, x0, z = (sample(1, 2, 8, 8, seed=seed) for seed in range(3))
    with apply(Projection(z, 4)) as scaled:
        torch.testing.assert_close(scaled.post_x0(x0, x, 0.9, 0), z)
        torch.testing.assert_close(scaled.post_x0(x0, x, 0.5, 2), project(x0, z, 0.5))
        assert scaled.post_x0(x0, x, 0.1, 4) is x0
    with pytest.raises(ConfigError, match="at least one step"):
        Projection(z, 0)


def test_aligned_flows_take_low_band_and_change_of_the_reference() -> None:
    x, y, a, b, ref_a, ref_b = (sample(1, 2, 8, 8, seed=seed) for seed in range(6))
    mask = butterworth(8, 8, 0.2)

    def low(picture: Tensor) -> Tensor:
        return low_pass(picture, mask)

    with apply(FlowAligned([ref_a, ref_b], alpha=1.0, beta=0.5)) as scaled:
        first = scaled.post_x0(a, x, 0.8, 0)
        # whole weight at the first step: the low band is the reference's
        torch.testing.assert_close(first, align(a, ref_a, 1.0, low), atol=1e-5, rtol=1e-5)
        second = scaled.post_x0(b, y, 0.6, 1)
        v = accelerate(
            velocity(y, align(b, ref_b, 0.5, low), 0.6),
            velocity(x, first, 0.8),
            velocity(y, ref_b, 0.6),
            velocity(x, ref_a, 0.8),
            0.25,
        )
        torch.testing.assert_close(second, y - v * (0.6 + 1e-6), atol=1e-5, rtol=1e-5)
        assert scaled.post_x0(b, y, 0.2, 2) is b
    # a run that follows its reference is not disturbed
    with apply(FlowAligned([a, b])) as scaled:
        torch.testing.assert_close(scaled.post_x0(a, x, 0.8, 0), a, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scaled.post_x0(b, y, 0.6, 1), b, atol=1e-5, rtol=1e-5)


def test_fused_scales_have_the_layout_of_one_and_the_detail_of_the_other() -> None:
    local, whole = sample(1, 2, 8, 8), sample(1, 2, 8, 8, seed=1)
    expected = gaussian_blur(local, 3, 1.0) + whole - gaussian_blur(whole, 3, 1.0)
    torch.testing.assert_close(fuse_scales(local, whole, 3), expected)
    torch.testing.assert_close(fuse_scales(whole, whole, 3), whole)


def test_windows_of_tokens_are_attended_each_on_its_own() -> None:
    layer, x = SelfAttention(8, 2), sample(1, 64, 8)
    got = attend_in_windows(layer, x, (8, 8), 4, 4)
    corner = x.view(1, 8, 8, 8)[:, :4, 4:].reshape(1, 16, 8)
    torch.testing.assert_close(got[0, :, :4, 4:].flatten(1).T, layer(corner)[0])
    assert grid_of(64, (8, 8)) == (8, 8)
    assert grid_of(32, (64, 128)) == (4, 8)
    assert grid_of(65, (8, 8)) is None


@pytest.mark.parametrize("layer", [SelfAttention(8, 2), Attention(8, heads=2, dim_head=4)])
def test_self_attention_is_fused_and_comes_back(layer: nn.Module) -> None:
    x = sample(1, 64, 8)
    plain = layer(x)
    local = attend_in_windows(layer, x, (8, 8), 4, 2)
    with apply(ScaleFusion(), nn.Sequential(layer)):
        got = layer(x)
        cut = layer(x[:, :63])
    expected = fuse_scales(local, plain.transpose(1, 2).unflatten(-1, (8, 8)), 3)
    torch.testing.assert_close(got, expected.flatten(2).transpose(1, 2))
    assert not torch.allclose(got, plain)
    assert torch.equal(layer(x), plain)
    assert torch.equal(cut, layer(x[:, :63]))  # no grid: nothing was fused
    with pytest.raises(ConfigError, match="no self-attention"), apply(ScaleFusion()):
        pass
