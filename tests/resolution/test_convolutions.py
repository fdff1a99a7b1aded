"""Re-dilated and Fourier convolutions, and their replacement in a network step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from genscale.errors import ConfigError
from genscale.resolution import apply_resolution
from genscale.resolution.dilated import (
    ConvReplacement,
    DilatedConvs,
    NoiseDampedConvs,
    dilated_conv,
    dilation_at,
    matching_convs,
    noise_damped,
    redilated_conv,
)
from genscale.resolution.fourier import (
    FourierConvs,
    FouriScaleBranches,
    filtered,
    fourier_conv,
    fourier_dilation_at,
    fourier_mask,
)


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_whole_dilations_are_plain_dilated_convolutions() -> None:
    x, conv = sample(1, 2, 8, 8), nn.Conv2d(2, 3, 3, padding=1)
    torch.testing.assert_close(redilated_conv(x, conv, 1.0), conv(x))
    expected = F.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2)
    torch.testing.assert_close(redilated_conv(x, conv, 2.0), expected)
    torch.testing.assert_close(dilated_conv(x, conv, 2), expected)
    # on a picture in which every cell is repeated it sees what the plain one sees in the original
    large = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(redilated_conv(large, conv, 2.0)[..., ::2, ::2], conv(x))


def test_any_dilation_and_stride_keeps_the_size_of_the_output() -> None:
    for stride in (1, 2):
        conv = nn.Conv2d(2, 3, 3, stride, padding=1)
        for dilation in (1.5, 2.3, 4.0):
            assert redilated_conv(sample(1, 2, 12, 18), conv, dilation).shape == (
                *(1, 3),
                *(12 // stride, 18 // stride),
            )


def test_dilations_end_and_may_fall_on_the_way() -> None:
    assert [dilation_at(i, 4.0, 4) for i in (0, 3, 4)] == [4, 4, 1]
    assert [dilation_at(i, 4.0, 4, progressive=True) for i in range(5)] == [4, 3, 2, 2, 1]
    assert [fourier_dilation_at(i, 3.0, 2, 4) for i in range(5)] == [3, 3, 3, 2, 1]
    assert noise_damped(torch.ones(1), torch.tensor([3.0]), torch.tensor([1.0]), 2.0).item() == 5


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1))


def test_listed_convolutions_are_dilated_until_a_step_and_come_back() -> None:
    model, x = net(), sample(1, 2, 8, 8)
    plain = model(x)
    op = DilatedConvs(["1"], until=3)
    with apply_resolution(model, [op], native=(4, 4), target=(8, 8)) as scaled:
        scaled.pre_step(x, 1.0, 0)
        torch.testing.assert_close(model(x), redilated_conv(model[0](x), model[1], 2.0))
        scaled.pre_step(x, 0.5, 3)
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)
    assert "forward" not in vars(model[1])
    with pytest.raises(ConfigError, match="No convolution of Sequential is named like mid"):
        matching_convs(model, ["mid*"])
    with pytest.raises(NotImplementedError, match="convolve"):
        ConvReplacement(["1"]).convolve(model[1], model[1].forward, x)


class Predicting(nn.Module):
    """Two convolutions that answer as a UNet of diffusers does, words added."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = net()

    def forward(
        self, x: Tensor, t: Tensor, words: Tensor, *, more: dict[str, Tensor], return_dict: bool
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        y = self.convs(x) + (words + more["text"])[:, :, None, None] * t
        return UNet2DConditionOutput(sample=y) if return_dict else (y,)


@pytest.mark.parametrize("return_dict", [False, True])
def test_guidance_can_start_from_a_less_dilated_network(return_dict: bool) -> None:
    model, x = Predicting(), sample(1, 2, 8, 8)
    words, more = sample(4, 2), {"text": sample(4, 2, seed=1)}
    pair = torch.cat((x, x, x, x))  # two unconditional, then two conditional

    def call() -> Tensor:
        out = model(pair, torch.tensor(2.0), words, more=more, return_dict=return_dict)
        found: Tensor = out[0] if isinstance(out, tuple) else out.sample
        return found

    def guided(batch: Tensor, scale: float) -> Tensor:
        uncond, cond = batch.chunk(2)
        return uncond + scale * (cond - uncond)

    sizes = {"native": (4, 4), "target": (8, 8)}
    settings = {"until": 5, "progressive": False}
    with torch.no_grad():
        plain = call()
        with apply_resolution(model, [DilatedConvs(["convs.*"], **settings)], **sizes):
            dilated_uncond, dilated_cond = call().chunk(2)
        with apply_resolution(model, [DilatedConvs(["convs.1"], **settings)], **sizes):
            weak = call()[:2]
        op = NoiseDampedConvs(["convs.*"], weak_layers=["convs.1"], damped_until=3, **settings)
        with apply_resolution(model, [op], **sizes) as scaled:
            for scale in (1.0, 7.5):
                expected = noise_damped(weak, dilated_cond, dilated_uncond, scale)
                torch.testing.assert_close(guided(call(), scale), expected)
            scaled.pre_step(x, 0.5, 3)  # dilated still, but guided as usual
            torch.testing.assert_close(call(), torch.cat((dilated_uncond, dilated_cond)))
            op.damped_until = 9  # longer than anything is dilated
            calls: list[int] = []
            model.convs[0].register_forward_hook(lambda *call: calls.append(len(call[2])))
            for step in (0, 5):
                scaled.pre_step(x, 0.5, step)
                call()
            assert calls == [4, 2, 4]  # no second pass once nothing is dilated
            scaled.pre_step(x, 0.5, 0)
            pair = pair[:3]
            words, more = words[:3], {"text": more["text"][:3]}
            with pytest.raises(ConfigError, match="unconditional and conditional halves"):
                call()
        pair, words, more = torch.cat((x, x, x, x)), sample(4, 2), {"text": sample(4, 2, seed=1)}
        assert torch.equal(call(), plain)


def test_the_mask_passes_the_trained_band_and_damps_the_rest_to_its_value() -> None:
    mask = fourier_mask(32, 48, 2.0, 0.6)
    torch.testing.assert_close(mask[8:24, 12:36], torch.ones(16, 24))  # half of each side
    assert mask[0, 24].item() == pytest.approx(0.6)
    assert mask[0, 0].item() == pytest.approx(0.36)
    torch.testing.assert_close(mask, mask.flip(0).flip(1))
    assert fourier_mask(31, 31, 2.0)[15, 15] == 1
    torch.testing.assert_close(fourier_mask(8, 8, 1.0, weak=True), torch.ones(8, 8))
    x = sample(1, 2, 7, 9)
    torch.testing.assert_close(filtered(x, (4, 4), 1.0, weak=True), x)  # filled up and cut again


def test_thirds_get_the_strong_filter_twice_and_the_weak_one() -> None:
    x, conv = sample(3, 2, 8, 8), nn.Conv2d(2, 3, 3, padding=1)
    y = fourier_conv(x, conv, 3.0, (4, 4))
    torch.testing.assert_close(
        y[:2], dilated_conv(filtered(x[:2], (4, 4), 3.0), conv, 3), atol=1e-6, rtol=1e-5
    )
    weak = filtered(x[2:], (4, 4), 3.0, weak=True)
    torch.testing.assert_close(y[2:], dilated_conv(weak, conv, 2), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="must be thirds"):
        fourier_conv(x[:2], conv, 2.0, (4, 4))


def test_fourier_convolutions_follow_the_step_in_a_network() -> None:
    model, x = net(), sample(3, 2, 8, 8)
    plain = model(x)
    op = FourierConvs(["1"], start=1, stop=3)
    with apply_resolution(model, [op], native=(4, 4), target=(8, 8)) as scaled:
        scaled.pre_step(x, 1.0, 0)
        torch.testing.assert_close(model(x), fourier_conv(model[0](x), model[1], 2.0, (4, 4)))
        scaled.pre_step(x, 1.0, 2)
        torch.testing.assert_close(model(x), fourier_conv(model[0](x), model[1], 1.5, (4, 4)))
        scaled.pre_step(x, 0.5, 3)
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)


class Attending(Predicting):
    """The same, with self-attention whose keys and queries are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(2, heads=1, dim_head=2)

    def forward(self, x: Tensor, *args: Tensor, **kwargs: Any) -> Any:
        return super().forward(self.attention(x), *args, **kwargs)


def test_pairs_become_three_branches_and_pairs_again() -> None:
    model, x = Attending(), sample(2, 2, 8, 8)
    pair, words = torch.cat((x, x)), sample(4, 2)
    more = {"text": torch.zeros(4, 2)}
    sizes = {"native": (4, 4), "target": (8, 8)}

    def call(rows: list[int], **settings: Any) -> Tensor:
        given = {"text": more["text"][rows]}
        out: Tensor = model(
            pair[rows], torch.tensor(2.0), words[rows], more=given, return_dict=False
        )[0]
        return out

    with torch.no_grad():
        plain = call([0, 1, 2, 3])
        convs = FourierConvs(["convs.*"], start=1, stop=3)
        with apply_resolution(model, [convs], **sizes):
            uncond, _, weak = call([0, 1, 2, 3, 2, 3]).chunk(3)
        op = FouriScaleBranches(["convs.*"], unfiltered=[], start=1, stop=3)
        with apply_resolution(model, [op], **sizes) as scaled:
            # both halves hold the same pictures: queries and keys of the strong branch are its own
            torch.testing.assert_close(call([0, 1, 2, 3]), torch.cat((uncond, weak)))
            with pytest.raises(ConfigError, match="FouriScale needs a batch of"):
                call([0, 1, 2])
            scaled.pre_step(x, 0.5, 3)
            assert torch.equal(call([0, 1, 2, 3]), plain)
        unfiltered = FouriScaleBranches(["convs.*"], unfiltered=["convs.1"], start=1, stop=3)
        with apply_resolution(model, [unfiltered], **sizes):
            assert unfiltered.value_of(model.convs[0]) == 0.6
            assert unfiltered.value_of(model.convs[1]) == 1.0
            assert not torch.equal(call([0, 1, 2, 3])[:2], uncond)
        assert torch.equal(call([0, 1, 2, 3]), plain)
        assert torch.equal(filtered(x, (4, 4), 2.0, 1.0), x)


def test_the_weak_branch_attends_with_queries_and_keys_of_the_strong_one() -> None:
    model, x = Attending(), sample(3, 2, 8, 8)
    op = FouriScaleBranches(["convs.*"])
    seen: dict[str, Tensor] = {}
    parts = {name: getattr(model.attention, name) for name in ("to_q", "to_k", "to_v")}
    with apply_resolution(model, [op], native=(4, 4), target=(8, 8)):
        for name, part in parts.items():
            part.register_forward_hook(lambda *call, name=name: seen.update({name: call[2]}))
        op._threefold = True
        model.attention(x)
    assert len(seen) == 3
    for name, (uncond, strong, weak) in seen.items():
        assert torch.equal(strong, weak) is (name != "to_v")
        assert not torch.equal(strong, uncond)
