"""Parity of EDM: preconditioning, loss, noise levels, and its sampler with and without churn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genscale.backbones.base import BackboneOutput
from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Level, on
from genscale.objectives.conversion import Extras, target_of
from genscale.objectives.edm import EDM
from genscale.objectives.paths import VarianceExploding
from genscale.samplers.ode import Heun
from genscale.samplers.schedules import Karras, level_grid
from scripts.parity import Case, Comparison
from scripts.parity.analytic import Gaussian


def run(case: Case) -> list[Comparison]:
    """Run a sampling case (``config.num_steps``) or a preconditioning case."""
    found = _run_sampler(case) if "num_steps" in case.config else _run_network(case)
    results = []
    for name, expected in case.group("output").items():
        if name not in found:
            raise KeyError(f"The case holds output/{name}, which this adapter does not know.")
        results.append(case.compare(name, found[name], expected))
    return results


class _Constant(nn.Module):
    """Returns one tensor whatever it is fed, and keeps what it was fed."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer, requires_grad=False)
        self.sample_shape = tuple(answer.shape[1:])

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None) -> Any:
        self.fed = (x, t)
        return BackboneOutput(self.answer)


def _run_network(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.group("input")
    objective = EDM(
        sigma_data=config["sigma_data"],
        log_sigma_mean=config["P_mean"],
        log_sigma_std=config["P_std"],
    )
    network = _Constant(inputs["F_out"])
    view = objective.view(network)  # type: ignore[arg-type]  # a network of one answer
    sigma = inputs["sigma"].double()
    level = objective.process.level(objective.process.time_of(-sigma.log()))
    clean = view(inputs["x"], level, Conditioning()).clean
    net_input, c_noise = network.fed

    uniform = torch.special.ndtr(inputs["loss_rnd_normal"].double())
    time = objective.sample_time(uniform)
    alpha, loss_sigma = objective.process.coefficients(time)
    y, eps = inputs["y"], inputs["loss_noise_unit"]
    extras = Extras(sigma_data=objective.sigma_data)
    target = target_of("edm", y, eps, on(alpha, y), on(loss_sigma, y), extras)
    return {
        "D": clean,
        "net_input": net_input,
        "c_noise": c_noise,
        "loss_sigma": loss_sigma,
        "loss_elementwise": (inputs["F_out"] - target).square(),
    }


def _run_sampler(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.group("input")
    process = VarianceExploding(config["sigma_min"], config["sigma_max"])
    schedule = Karras(config["sigma_min"], config["sigma_max"], config["rho"])
    steps = config["num_steps"]
    sampler = Heun(
        steps,
        churn=config["S_churn"],
        churn_min=config["S_min"],
        churn_max=float(config["S_max"]),
        churn_noise=config["S_noise"],
        schedule=schedule,
        precision="float64",
    )
    model = Gaussian(process, inputs["mu"], inputs["s"])
    plain = level_grid(process, schedule, steps)
    x0 = run_churned(sampler, model, plain, inputs["latents"], inputs["churn_noise"])
    # data of normals: y = x / alpha moves with sqrt(s^2 + sigma^2) about the mean
    first = float(plain.sigma[0])
    start = inputs["latents"] * first
    shrink = inputs["s"] / torch.sqrt(inputs["s"] ** 2 + first**2)
    return {
        "x0": x0,
        "t_steps": plain.sigma,
        "call_sigma": torch.cat(model.sigmas),
        "call_x": torch.stack(model.inputs),
        "exact_ode_x0": inputs["mu"] + (start - inputs["mu"]) * shrink,
    }


def run_churned(sampler: Any, model: Any, plain: Level, latents: Tensor, draws: Tensor) -> Tensor:
    """Sample with the official order of draws: the i-th one before step i.

    Ours adds the noise of step i at the end of step i - 1, and that of step 0 in the start.
    """
    process = model.process
    raised = sampler.grid(process)
    extra = torch.sqrt((raised.sigma[:1] ** 2 - plain.sigma[:1] ** 2).clamp_min(0.0))
    start = plain.sigma[:1] * latents + sampler.churn.factor * extra * draws[0]
    std = torch.hypot(plain.sigma[:1], sampler.churn.factor * extra)
    seeds = torch.arange(len(latents))
    state = sampler.start(model, Conditioning(), seeds, start / std)
    for i in range(sampler.num_steps):
        noise = draws[i + 1] if i + 1 < len(draws) else torch.zeros_like(draws[0])
        state = sampler.advance(model, state, noise)
    result: Tensor = sampler.finish(state)
    return result
