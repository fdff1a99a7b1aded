"""Parity of Flow-GRPO's stochastic flow step (arXiv:2505.05470): its law and its log-density.

The official last step adds noise too and ours does not, so that its mean and noise are compared
through the equation itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.objectives.base import on
from genscale.objectives.schedule import LinearFlow, NoiseProcess
from genscale.samplers.base import State
from genscale.samplers.diffusers_bridge import DiffusersSampler
from genscale.samplers.reverse_sde import ReverseSDE, step_law
from genscale.samplers.schedules import LevelSchedule
from scripts.parity import Case, Comparison


@dataclass(frozen=True)
class _Table(LevelSchedule):
    """Given times."""

    given: tuple[float, ...]

    def times(self, process: NoiseProcess, intervals: int) -> Tensor:
        return torch.tensor(self.given, dtype=torch.float64)


def run(case: Case) -> list[Comparison]:
    """Take step i of the sampler in row i."""
    config, inputs, outputs = case.config, case.group("input"), case.group("output")
    steps, norm = config["steps"], config["noise_level"]
    sampler = ReverseSDE(steps, diffusion="flow_grpo", norm=norm, last_size=None)
    # the official grid is that of a scheduler of diffusers, which shifts its own ends too
    sampler.schedule = _Table(tuple(inputs["sigmas"].double().tolist()))
    settings = {"shift": config["shift"]}
    bridge = DiffusersSampler("FlowMatchEulerDiscreteScheduler", steps, config=settings)
    state = _state(inputs)
    mean, std = sampler.transition(state)
    last_mean, last_std = _last_step(state, inputs["sigmas"], norm)
    mean, std = torch.cat((mean[:-1], last_mean)), torch.cat((std[:-1], last_std))
    moved = mean + on(std, mean) * inputs["noise"]
    density = sampler.log_prob(state, moved, reduce="mean")[:-1]
    off = (moved[-1:] - last_mean).double() / last_std
    last = -0.5 * off.square().mean() - float(last_std.log()) - 0.5 * math.log(2.0 * math.pi)
    sigmas = sampler.grid(LinearFlow()).sigma
    spans = (sigmas[:-1] - sigmas[1:]).sqrt()
    found = {
        "prev_mean": mean,
        "prev_sample": moved,
        "std": std / spans,  # the diffusion, before the square root of the step
        "mean_log_prob": torch.cat((density, last.view(1))),
    }
    atol = float(case.info["tolerance"]["abs"])
    results = [
        Comparison(name, found[name].to(expected.dtype), expected, atol, 0.0)
        for name, expected in outputs.items()
    ]
    grid = bridge.grid(LinearFlow()).sigma
    return [*results, Comparison("sigmas", grid, inputs["sigmas"], 1e-6, 0.0)]


def _state(inputs: dict[str, Tensor]) -> State:
    """Return the evaluated state in which particle i stands at step i."""
    x, velocity = inputs["sample"], inputs["velocity"]
    sigma = on(inputs["sigmas"][:-1], x)
    count = len(x)
    zero = torch.zeros(count, dtype=torch.int64)
    return State(
        x=x,
        cond=Conditioning(),
        step=torch.arange(count),
        seeds=zero,
        lineage=zero,
        group=zero,
        nfe=zero.double(),
        clean=x - sigma * velocity,
        noise=x + (1.0 - sigma) * velocity,
        process=LinearFlow(),
    )


def _last_step(state: State, sigmas: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the last step with its noise."""
    begin, end = sigmas[-2:-1].double(), sigmas[-1:].double()
    weight = 0.5 * norm**2 * begin / (1.0 - begin)
    last = state.select(torch.tensor([len(state) - 1]))
    return step_law(last, LinearFlow(), begin, end, weight)
