"""Pipelines of diffusers run their own loop: operators are told its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from genscale.errors import ConfigError
from genscale.resolution import ResolutionOp, apply_resolution
from genscale.resolution.branches import check_halves, prediction_of, rows_of, with_prediction
from genscale.resolution.pipelines import noise_share, pipeline_callback
from genscale.resolution.presets import FouriScale, ScaleCrafter
from tests.upscaling.test_latent_upscaler import sd_pipe


@pytest.fixture
def pipe() -> Any:
    return sd_pipe()[0]


def made(pipe: Any, **settings: Any) -> Tensor:
    latents: Tensor = pipe(
        prompt_embeds=torch.ones(1, 4, 8),
        negative_prompt_embeds=torch.zeros(1, 4, 8),
        guidance_scale=5.0,
        num_inference_steps=4,
        height=16,
        width=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **settings,
    ).images
    return latents


class Notes(ResolutionOp):
    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        self.steps.append((i, float(t)))
        return x


def test_every_step_is_told_with_its_share_of_noise(pipe: Any) -> None:
    notes = Notes()
    with apply_resolution(pipe, [notes], native=(8, 8), target=(16, 16)) as scaled:
        for _ in range(2):  # a callback a run
            notes.steps.clear()
            made(pipe, callback_on_step_end=scaled.pipeline_callback())
            assert [step for step, _ in notes.steps] == [0, 1, 2, 3]
            shares = [share for _, share in notes.steps]
            assert shares[0] == 1.0
            assert shares[1:] == [noise_share(pipe.scheduler, step) for step in (1, 2, 3)]
            assert shares == sorted(shares, reverse=True)


def test_convolutions_are_dilated_in_the_first_steps_of_a_pipeline(pipe: Any) -> None:
    layers = ["mid_block.resnets.*.conv[12]"]
    plain = made(pipe)
    sizes = {"native": (8, 8), "target": (16, 16)}
    results = []
    for tau in (1, 2, 4):
        ops = ScaleCrafter(layers=layers, dilate_tau=tau).operators(pipe.unet, (8, 8), (16, 16))
        with apply_resolution(pipe, ops, **sizes) as scaled:
            results.append(made(pipe, callback_on_step_end=pipeline_callback(scaled)))
        with apply_resolution(pipe, ops, **sizes):  # nobody tells the step: dilated to the end
            untold = made(pipe)
        assert torch.equal(untold, results[-1]) is (tau == 4)
    for one, other in zip((plain, *results), results, strict=False):
        assert not torch.allclose(one, other, atol=1e-6)
    fourier = FouriScale(layers=layers, start_step=1, stop_step=3)
    ops = fourier.operators(pipe.unet, (8, 8), (16, 16))
    with apply_resolution(pipe, ops, **sizes) as scaled:
        filtered = made(pipe, callback_on_step_end=scaled.pipeline_callback())
    assert not torch.allclose(filtered, plain, atol=1e-6)
    damped = ScaleCrafter(layers=[*layers, "up_blocks.0.resnets.*.conv1"], ndcfg_tau=4)
    ops = damped.operators(pipe.unet, (8, 8), (16, 16))
    with apply_resolution(pipe, ops, **sizes) as scaled:
        made(pipe, callback_on_step_end=scaled.pipeline_callback())
    assert torch.equal(made(pipe), plain)


def test_rows_are_taken_of_whatever_a_call_holds() -> None:
    x, other = torch.arange(4.0), torch.arange(3.0)
    call = {"words": x, "more": {"sizes": (x, other)}, "t": torch.tensor(5.0), "flag": True}
    rows = rows_of(call, 4, slice(2))
    assert torch.equal(rows["words"], x[:2])
    assert torch.equal(rows["more"]["sizes"][0], x[:2])
    assert rows["more"]["sizes"][1] is other  # no batch
    assert (rows["t"], rows["flag"]) == (call["t"], True)
    for out in ((x, "rest"), UNet2DConditionOutput(sample=x)):
        assert prediction_of(out) is x
        changed = with_prediction(out, other)
        assert type(changed) is type(out)
        assert prediction_of(changed) is other
    check_halves(x, "This", "do that")
    with pytest.raises(ConfigError, match=r"This needs .* 3 samples\. .*, or do that\."):
        check_halves(other, "This", "do that")


def test_noise_is_measured_alike_whatever_the_scheduler() -> None:
    flow = FlowMatchEulerDiscreteScheduler(shift=1.0)
    diffusion, edm = DDIMScheduler(), EDMEulerScheduler()
    of_flow = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    for scheduler in (flow, diffusion, edm, of_flow):
        scheduler.set_timesteps(8)
        shares = [noise_share(scheduler, step) for step in range(8)]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > 0.9
        assert 0 <= shares[-1] < 0.3
    assert noise_share(flow, 3) == pytest.approx(float(flow.sigmas[3]))
    signal = float(diffusion.alphas_cumprod[int(diffusion.timesteps[3])]) ** 0.5
    noise = (1 - signal**2) ** 0.5
    assert noise_share(diffusion, 3) == pytest.approx(noise / (noise + signal), abs=1e-6)
    assert noise_share(edm, 3) == pytest.approx(float(edm.sigmas[3] / (1 + edm.sigmas[3])))
