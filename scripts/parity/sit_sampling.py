"""Parity of SiT's interpolants: paths, losses, conversions, diffusions, ODE and SDE samplers.

The official time runs from 0, noise, to 1, data; ours is 1 minus that, and velocities change sign.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genscale.backbones.base import BackboneOutput
from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Batch, Denoiser, on
from genscale.objectives.flow import FlowMatching, score_diffusion
from genscale.samplers.grid import GridSampler
from genscale.samplers.reverse_sde import ReverseSDE, ReverseSDEHeun, diffusion_of
from genscale.samplers.runge_kutta import RungeKutta, slope_of
from genscale.samplers.schedules import Linear
from scripts.parity import Case, Comparison
from scripts.parity.dit_sampling import DoubledNetwork, GivenDraws, build, labels
from scripts.parity.dopri5 import integrate

_PATHS: dict[str, Any] = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
_METHODS: dict[str, Any] = {
    "euler": "euler",
    "midpoint": "midpoint",
    "heun2": "heun",
    "rk4": "rk4",
}


def run(case: Case) -> list[Comparison]:
    """Run a case of paths (``config.paths``) or of samplers (``config.runs``)."""
    with torch.no_grad():
        found = _samples(case) if "runs" in case.config else _transport(case)
    results = []
    for name, expected in case.group("output").items():
        if name not in found:
            raise KeyError(f"The case holds output/{name}, which this adapter does not know.")
        results.append(case.compare(name, found[name], expected))
    return results


class _Answer(nn.Module):
    """A network of one answer, whatever it is fed."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)
        self.sample_shape = tuple(answer.shape[1:])

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None) -> Any:
        return BackboneOutput(self.answer)


def _objective(path: str, target: str, weighting: str = "None") -> FlowMatching:
    names: dict[str, Any] = {"velocity": "velocity", "noise": "epsilon", "score": "score"}
    weights: dict[str, Any] = {"None": "none"}
    # the official velocity loss has no weight, whatever is asked for
    weight: Any = "none" if target == "velocity" else weights.get(weighting, weighting)
    return FlowMatching(
        path=_PATHS[path],
        target=names[target],
        weighting=weight,
        time_law="uniform",
        time_input="one_minus",
    )


def _transport(case: Case) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in case.config["paths"]:
        own = _path_numbers(path, case)
        for target in ("velocity", "noise", "score"):
            own.update(_target_numbers(path, target, case))
        found.update({f"{path}.{name}": value for name, value in own.items()})
    return found


def _path_numbers(path: str, case: Case) -> dict[str, Tensor]:
    """Return what depends on the path alone."""
    inputs, norm = case.group("input"), case.config["diffusion_norm"]
    process, noise, data = _objective(path, "velocity").process, inputs["x0"], inputs["x1"]
    time = 1.0 - inputs["t"].double()
    alpha, sigma = process.coefficients(time)
    alpha_rate, sigma_rate = process.rates(time)
    x = on(alpha, data) * data + on(sigma, data) * noise
    found = {
        "alpha": alpha,
        "sigma": sigma,
        "d_alpha": -alpha_rate,
        "d_sigma": -sigma_rate,
        "xt": x,
        "ut": -slope_of(process, time, data, noise),
        "drift": on(alpha_rate / alpha, x) * x,
        "diffusion": score_diffusion(process, time),
    }
    for form in (*("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"),):
        name: Any = form.lower().replace("-", "_")
        found[f"w.{form}"] = diffusion_of(name, norm, process, time)
    return found


def _target_numbers(path: str, target: str, case: Case) -> dict[str, Tensor]:
    """Return losses, scores, drifts and intervals of one kind of prediction."""
    inputs = case.group("input")
    noise, data, answer = inputs["x0"], inputs["x1"], inputs["net"]
    time = 1.0 - inputs["t"].double()
    objective = _objective(path, target)
    process = objective.process
    alpha, sigma = process.coefficients(time)
    x = on(alpha, data) * data + on(sigma, data) * noise
    network: Any = _Answer(answer)
    guess = objective.view(network)(x, process.level(time), Conditioning())
    velocity = -slope_of(process, time, guess.clean, guess.noise)
    score = -guess.noise / on(sigma, x)
    found = {f"ode_drift.{target}": velocity, f"score.{target}": score}
    if target == "velocity":
        # the official conversions were called with the true velocity
        alpha_rate, sigma_rate = process.rates(time)
        truth = on(alpha_rate, data) * data + on(sigma_rate, data) * noise
        oracle: Any = _Answer(-truth)
        own = objective.view(oracle)(x, process.level(time), Conditioning())
        found |= {"score_from_velocity": -own.noise / on(sigma, x)}
        found |= {"noise_from_velocity": own.noise}
    if target == "score":
        found["velocity_from_score"] = velocity
    for weighting in ("None", "velocity", "likelihood"):
        weighted = _objective(path, target, weighting)
        low, high = weighted.time_range
        draws: Any = GivenDraws((time - low) / (high - low), noise)
        batch = Batch(data, Conditioning(), torch.arange(len(data)))
        found[f"loss.{target}.{weighting}"] = weighted.loss(network, batch, draws).per_sample
    start, end = 1.0 - process.t_max, objective.sampling_end
    for sde in (0, 1):
        for last in (0.0, 0.04):
            ends = last if sde and last > 0.0 else end
            interval = torch.tensor([start, 1.0 - ends])
            found[f"interval.{target}.sde{sde}.last{last}"] = interval
    return found


def _samples(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.group("input")
    model, y = build(case), inputs["y"]
    network: Any = DoubledNetwork(model, config["cfg_scale"])
    cond = labels(model, torch.cat((y, torch.full_like(y, model.num_classes))))
    latents = inputs["z"].repeat(2, 1, 1, 1)
    found: dict[str, Tensor] = {}
    for name, settings in config["runs"].items():
        official = next((p for p in _PATHS if p.lower() in name.lower().split("_")), "Linear")
        objective = _objective(settings.get("path_type", official), "velocity")
        view = objective.view(network)
        if settings["sampling_method"] == "dopri5":
            found[name] = _adaptive(settings, objective, view, cond, latents)
            continue
        draws = inputs.get(f"noise.{name}", torch.zeros(0))
        sampler = _sampler(settings, objective)
        ones = torch.ones_like(latents[:1])
        std = sampler.start(view, Conditioning(), torch.arange(1), ones).x
        if isinstance(sampler, ReverseSDEHeun):
            # ours adds the noise of the first step in the start
            first = (std.double() ** 2 - 1.0).sqrt().to(latents)
            start, draws = latents + first * draws[0], draws[1:]
        else:
            start = latents
        state = sampler.start(view, cond, torch.arange(len(latents)), start / std)
        for i in range(sampler.num_steps):
            state = sampler.advance(view, state, draws[i] if i < len(draws) else latents)
        found[name] = sampler.finish(state)
    return found


def _adaptive(
    settings: dict[str, Any],
    objective: FlowMatching,
    view: Denoiser,
    cond: Conditioning,
    latents: Tensor,
) -> Tensor:
    process = objective.process

    def slope(time: float, x: Tensor) -> Tensor:
        own = torch.tensor([1.0 - time], dtype=torch.float64)
        guess = view(x, process.level(own), cond)
        return -slope_of(process, own, guess.clean, guess.noise)

    ends = (1.0 - process.t_max, 1.0 - objective.sampling_end)
    return integrate(slope, latents, *ends, atol=settings["atol"], rtol=settings["rtol"])


def _sampler(settings: dict[str, Any], objective: FlowMatching) -> GridSampler:
    if settings["kind"] == "ode":
        method = _METHODS[settings["sampling_method"]]
        schedule = Linear(end=objective.sampling_end)
        return RungeKutta(settings["num_steps"] - 1, method=method, last="full", schedule=schedule)
    common: dict[str, Any] = {
        "diffusion": settings["diffusion_form"].lower().replace("-", "_"),
        "norm": settings["diffusion_norm"],
        "last": settings["last_step"].lower(),
        "last_size": settings["last_step_size"],
    }
    kind = ReverseSDE if settings["sampling_method"] == "Euler" else ReverseSDEHeun
    return kind(settings["num_steps"], **common)
