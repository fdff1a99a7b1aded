"""Telling operators the steps of a pipeline of diffusers, which runs its own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from genscale.resolution.base import apply_resolution

PipelineCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""What pipelines call after every step: (pipeline, step, timestep, values) -> values."""


def noise_share(scheduler: Any, step: int) -> float:
    """Return the share of noise, sigma / (alpha + sigma), at which a scheduler's step starts.

    Args:
        scheduler: of diffusers, with its timesteps set: of flows, of variance-preserving
            diffusion, or of unscaled data (EDM).
        step: counted from 0.
    """
    config, products = scheduler.config, getattr(scheduler, "alphas_cumprod", None)
    if products is not None and not config.get("use_flow_sigmas", False):
        timestep = int(scheduler.timesteps[step])
        alpha, sigma = float(products[timestep]) ** 0.5, float(1 - products[timestep]) ** 0.5
        return sigma / (alpha + sigma)
    sigma = float(scheduler.sigmas[step])
    return sigma / (1 + sigma) if "sigma_data" in config else sigma


def pipeline_callback(scaled: apply_resolution) -> PipelineCallback:
    """Return a ``callback_on_step_end`` that tells operators of every step of one run.

    It tells them now that the first step comes, of pure noise, so that a callback is for one run.

    Args:
        scaled: with operators that are on.
    """
    scaled.pre_step(torch.empty(0), 1.0, 0)

    def callback(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step + 1 < len(pipeline.scheduler.timesteps):
            share = noise_share(pipeline.scheduler, step + 1)
            values["latents"] = scaled.pre_step(values["latents"], share, step + 1)
        return values

    return callback
