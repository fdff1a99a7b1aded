"""Parity of DiMR's noise schedule and of its published sampler with guidance."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.dimr import DiMR
from genscale.conditioning.base import NULL_LABEL, Conditioning
from genscale.guidance.base import Guidance, Unguided
from genscale.guidance.cfg import ClassifierFree
from genscale.io.converters.dimr import config_from_official, from_official
from genscale.objectives.base import on
from genscale.objectives.ddpm import DDPM
from genscale.objectives.schedule import DiscreteVP
from genscale.objectives.time_input import time_input_of
from genscale.samplers.dpm_fast import DPMSolverFast
from scripts.parity import Case, Comparison

# how the cases write the squared-linear schedule: linspace(sqrt(first),sqrt(last),N,...)**2
_BETAS = re.compile(r"linspace\(sqrt\(([\d.e-]+)\),\s*sqrt\(([\d.e-]+)\),\s*(\d+)")


def run(case: Case) -> list[Comparison]:
    """Run a schedule case (``config.n_timestep``) or a sampling case (``config.solver``)."""
    return _run_solver(case) if "solver" in case.config else _run_schedule(case)


def _run_schedule(case: Case) -> list[Comparison]:
    config, inputs = case.config, case.group("input")
    process = DiscreteVP(
        "sd_scaled_linear",
        config["n_timestep"],
        (config["linear_start"], config["linear_end"]),
    )
    time = inputs["n"].double() / config["n_timestep"]
    alpha, sigma = process.coefficients(time)
    x0 = inputs["x0"]
    alpha_t, sigma_t = process.coefficients(inputs["t"])
    found = {
        "xn": on(alpha, x0) * x0 + on(sigma, x0) * inputs["eps"],
        "cum_alpha": alpha.square(),
        "cum_beta": sigma.square(),
        "log_snr_code": time_input_of("dimr_linear", time, alpha, sigma),
        "log_alpha_t": alpha_t.log(),
        "sigma_t": sigma_t,
        "lambda_t": process.level(inputs["t"]).log_snr,
    }
    return _compare_all(case, found)


def _run_solver(case: Case) -> list[Comparison]:
    config, inputs = case.config, case.group("input")
    model = DiMR(**config_from_official(config["model"], parity=True))
    model.load_state_dict(from_official(case.group("state"), model))
    model.eval()
    objective = _objective(config["solver"])
    view = _guidance(config).wrap(objective.view(model))
    cond = Conditioning()
    if "y" in inputs:
        null = config.get("null_class", config["model"].get("num_classes", 0) - 1)
        cond = Conditioning(labels=inputs["y"].masked_fill(inputs["y"] == null, NULL_LABEL))

    called: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: called.append((inputs[1][0] + 4.0) / 8.0))
    level = objective.process.level(objective.process.t_max)
    # the official program starts at the unit normal itself
    noise = inputs["z_init"] / on(level.sigma, inputs["z_init"])
    found: dict[str, Tensor] = {}
    for steps in config["steps"]:
        called.clear()
        sampler = DPMSolverFast(steps, order=config["solver"]["order"])
        seeds = torch.arange(len(noise))
        with torch.no_grad():
            state = sampler.run(view, cond, seeds, noise)
        found[f"z_{steps}"] = sampler.finish(state)
        found[f"times_{steps}"] = torch.stack(called)
    return _compare_all(case, found)


def _objective(solver: dict[str, Any]) -> DDPM:
    """Build the objective whose process the solver's settings describe."""
    known = {
        "predict_x0": True,
        "skip_type": "time_uniform",
        "method": "fast",
        "solver_type": "dpm_solver",
        "T": 1.0,
    }
    for name, value in known.items():
        if solver.get(name, value) != value:
            raise ValueError(
                f"solver.{name} is {solver[name]!r}, but only {value!r} has a counterpart here."
            )
    match = _BETAS.match(solver["betas"])
    if match is None:
        raise ValueError(
            f"solver.betas is {solver['betas']!r}; linspace(sqrt(a),sqrt(b),N,...)**2 was expected."
        )
    objective = DDPM(num_timesteps=int(match[3]), beta_range=(float(match[1]), float(match[2])))
    if abs(solver["eps"] - objective.process.t_min) > 1e-9:
        raise ValueError(
            f"solver.eps is {solver['eps']}, but sampling ends at {objective.process.t_min}."
        )
    return objective


def _guidance(config: dict[str, Any]) -> Guidance:
    """Translate the official scale: c + w (c - u), or u + g(t) (c - u) where a power is given."""
    power = config.get("cfg_scale_pow", -1)
    if "cfg_scale" not in config:
        return Unguided()
    if power < 0:
        return ClassifierFree(1.0 + config["cfg_scale"])
    if power == 0:  # parity: the official program then does not guide at all
        return Unguided()
    return ClassifierFree(config["cfg_scale"], form="power_cosine", power=power)


def _compare_all(case: Case, found: dict[str, Tensor]) -> list[Comparison]:
    results = []
    for name, expected in case.group("output").items():
        if name not in found:
            raise KeyError(f"The case holds output/{name}, which this adapter does not know.")
        results.append(case.compare(name, found[name], expected))
    return results
