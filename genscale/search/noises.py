"""All the noise behind a sample: what searches over noises move."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.samplers.base import State
from genscale.search.engine import Engine


def own_noises(engine: Engine, seeds: Tensor) -> Tensor:
    """Return the unit noises ``(G, K, ...)`` that trajectories of these seeds draw themselves.

    The first is that of the start. Diffusion samplers that draw noise have one more for each step:
    moved alone, the start would matter little to them, and on some not at all.

    Args:
        engine: of G prompts.
        seeds: ``(G,)`` int64.
    """
    noises = [engine.noise(seeds)]
    if engine.sampler.family == "diffusion" and engine.sampler.stochastic:
        state = engine.start(1, seeds=seeds)
        for step in range(engine.sampler.num_steps):
            at = state.replace(step=torch.full_like(state.step, step))
            noises.append(engine.sampler.step_noise(engine.model, at).to(noises[0]))
    return torch.stack(noises, 1)


def run_noises(engine: Engine, noises: Tensor, seeds: Tensor, wanted: Tensor) -> State:
    """Sample from noises to the end.

    Args:
        engine: of G prompts.
        noises: ``(G, N, K, ...)``, of :func:`own_noises` or moved.
        seeds: ``(G,)`` int64 of whatever else is drawn: the same for all noises of a prompt, so
            that noises alone make the difference.
        wanted: ``(G, N)`` bool, which to sample.

    Returns:
        finished particles in the order of ``wanted``'s rows.
    """
    count = wanted.shape[1]
    rows = wanted.flatten().nonzero()[:, 0]
    state = engine.start(
        count, noise=noises[:, :, 0].flatten(0, 1), seeds=seeds.repeat_interleave(count)
    )
    state = state.select(rows)
    if noises.shape[2] == 1:
        return engine.run(state)
    steps = noises.flatten(0, 1)[rows.to(noises.device), 1:]
    for step in range(steps.shape[1]):
        state = engine.advance(state, steps[:, step])
    return state
