"""Parity of U-ViT with its official program and with ScaleLong: outputs and gradients.

Cases with the continuous variance-preserving process hold two samplers besides: see
:func:`_run_process`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.uvit import UViT
from genscale.conditioning.base import NULL_LABEL, Conditioning
from genscale.io.converters.uvit import config_from_official, from_official, to_official
from genscale.objectives.base import Batch, on
from genscale.objectives.ddpm import DDPM
from genscale.objectives.paths import ContinuousVP
from scripts.parity import Case, Comparison
from scripts.parity.dit_sampling import GivenDraws


def run(case: Case) -> list[Comparison]:
    """Run one case; what kind it is follows from the settings it holds."""
    return _run_process(case) if "sde" in case.config else _run_model(case)


def _build(case: Case, settings: dict[str, object]) -> UViT:
    model: UViT = UViT(**config_from_official(settings))
    model.load_state_dict(from_official(case.group("state"), model))
    model.eval()
    return model


def _run_model(case: Case) -> list[Comparison]:
    model = _build(case, case.config)
    inputs = case.group("input")
    labels = inputs.get("y")
    if labels is not None:
        labels = labels.masked_fill(labels == model.num_classes, NULL_LABEL)
    cond = Conditioning(labels=labels, text=inputs.get("context"))
    t = inputs["timesteps"].float()
    output = model(inputs["x"], t, cond).sample
    results = [
        case.compare(name, {"out": output}[name], expected)
        for name, expected in case.group("output").items()
    ]
    if bool((t == t[0]).all()):  # the shared-time hint must change nothing
        shared = model(inputs["x"], t[:1], cond).sample
        results.append(case.compare("shared time", shared, case.group("output")["out"]))
    if grads := case.group("grad"):
        torch.autograd.backward(output.square().mean())
        own = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        }
        official = to_official(own, model.config)
        results += [
            case.compare(f"grad {name}", official[name], grad) for name, grad in grads.items()
        ]
    return results


def _run_process(case: Case) -> list[Comparison]:
    """Check the objective of continuous time, its view, and both Euler samplers in time.

    From t to s < t they take x + (f - g^2 score / 2) (s - t), or x + (f - g^2 score) (s - t) and
    sqrt(t - s) g noise, with f = -beta x / 2, g^2 = beta and score = -eps / sigma. The last step,
    to 0, adds no noise.
    """
    model = _build(case, case.config["model"])
    objective = DDPM(betas="continuous", time_input="vp_index")
    process, view = objective.process, objective.view(model)
    assert isinstance(process, ContinuousVP)
    inputs = case.group("input")

    def noise_of(x: Tensor, time: Tensor) -> Tensor:
        with torch.no_grad():
            return view(x, process.level(time), Conditioning()).noise

    def loss_of(row: slice) -> Tensor:
        draws: Any = GivenDraws(inputs["t"][row].double(), inputs["eps"][row])
        batch = Batch(inputs["x0"][row], Conditioning(), torch.arange(1))
        with torch.no_grad():
            return objective.loss(model, batch, draws).per_sample

    def sample(noises: Tensor | None) -> Tensor:
        x = inputs["eps"]
        steps = case.config["steps"]
        grid = [0.0, *torch.linspace(1e-3, 1.0, steps, dtype=torch.float64).tolist()]
        for k, (t, s) in enumerate(pairwise(reversed(grid))):
            time = torch.tensor([t], dtype=torch.float64)
            sigma = float(process.coefficients(time)[1])
            beta = process.beta_min + (process.beta_max - process.beta_min) * t
            score = -noise_of(x, time) / sigma
            share = 0.5 if noises is None else 1.0
            x = x + (-0.5 * beta * x - share * beta * score) * (s - t)
            if noises is not None and s > 0.0:
                x = x + (beta * (t - s)) ** 0.5 * noises[k]
        return x

    time = inputs["t"]
    alpha, sigma = (part.float() for part in process.coefficients(time))
    noisy = on(alpha, inputs["x0"]) * inputs["x0"] + on(sigma, inputs["x0"]) * inputs["eps"]
    predicted = noise_of(noisy, time)
    found = {
        "xt": noisy,
        "pred": predicted,
        "loss": torch.cat([loss_of(slice(i, i + 1)) for i in range(len(time))]),
        "cum_alpha": alpha**2,
        "snr": (alpha / sigma) ** 2,
        "z_ode": sample(None),
        "z_sde": sample(inputs["sde_noise"]),
    }
    return [
        case.compare(name, found[name], expected) for name, expected in case.group("output").items()
    ]
