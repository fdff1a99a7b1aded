"""Parity of input-scaled EDM: its coefficients, target, loss weights, and its sampler."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from genscale.backbones.base import BackboneOutput
from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Batch, Level, on
from genscale.objectives.edm import EDM
from genscale.rng import Purpose, StepRandom
from genscale.samplers.ode import Heun
from genscale.samplers.schedules import Karras
from scripts.parity import Case, Comparison
from scripts.parity.analytic import Gaussian


def run(case: Case) -> list[Comparison]:
    """Compare every output of a case.

    The reference speaks of z = x / sigma_in + s eps and of a network of the other sign; ours of
    sigma_in z and of EDM's sign. What is compared is brought to the reference's terms here.
    """
    found = {**_network(case), **_sampling(case)}
    results = []
    for name, expected in case.group("output").items():
        if name not in found:
            raise KeyError(f"The case holds output/{name}, which this adapter does not know.")
        results.append(case.compare(name, found[name], expected))
    return results


class _Fixed(nn.Module):
    """Answers the same whatever it is fed, and keeps what it was fed."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer, requires_grad=False)
        self.sample_shape = tuple(answer.shape[1:])

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None) -> Any:
        self.fed = (x, t)
        return BackboneOutput(self.answer)


class _Given(StepRandom):
    """Random numbers of a batch that were drawn elsewhere."""

    __slots__ = ("noise", "quantile")
    noise: Tensor
    quantile: Tensor

    def __init__(self, quantile: Tensor, noise: Tensor) -> None:
        super().__init__(0, torch.arange(len(noise)))
        object.__setattr__(self, "quantile", quantile)
        object.__setattr__(self, "noise", noise)

    def uniform(self, purpose: Purpose) -> Tensor:
        """Return the quantile of the time."""
        return self.quantile

    def normal(self, purpose: Purpose, shape: tuple[int, ...]) -> Tensor:
        """Return the noise."""
        return self.noise


def _objective(config: dict[str, Any]) -> EDM:
    sampler = config["sampler"]
    return EDM(
        sigma_data=config["sigma_data"],
        sigma_in=config["sigma_in"],
        sigma_min=sampler["sigma_min"],
        sigma_max=sampler["sigma_max"],
        rho=sampler["rho"],
    )


def _network(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.group("input")
    objective, scale = _objective(config), config["sigma_in"]
    process, s = objective.process, inputs["sigma"].double()
    level = process.level(process.time_of(-torch.log(scale * s)))
    x, eps, answer = inputs["x"], inputs["eps"], inputs["F_out"]

    def clean(noisy: Tensor, prediction: Tensor) -> Tensor:
        """Return D of a z, for a prediction of the reference's sign."""
        view = objective.view(_Fixed(-prediction))  # type: ignore[arg-type]  # of one answer
        fed.append(view)
        found: Tensor = view(scale * noisy, level, Conditioning()).clean
        return found

    fed: list[Any] = []
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    c_skip, c_out = _one_each(clean(one, zero)), _one_each(clean(zero, one))
    c_in = _one_each(fed[0].backbone.fed[0])

    def loss_of(data: Tensor, noise: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample, and what the network was fed."""
        normal = (torch.log(s) - objective.log_sigma_mean) / objective.log_sigma_std
        given = _Given(torch.special.ndtr(normal), noise)
        network = _Fixed(-prediction)
        batch = Batch(data, Conditioning(), given.position)
        result = objective.loss(network, batch, given)  # type: ignore[arg-type]
        return result.per_sample, network.fed[0]

    # the target is what a network must have answered for its loss to be 0: eps and x alone
    target = _solve_target(objective, x, eps, level)
    assert float(loss_of(x, eps, target)[0].max()) < 1e-10
    loss, fed_in_training = loss_of(x, eps, answer)
    effective, _ = loss_of(zero, zero, one)
    return {
        "x_sigma": fed_in_training / on(c_in, x),
        "c_in": c_in,
        "c_skip": c_skip,
        "c_out": c_out,
        # of data 0 and noise 1 the target is c_nrm sigma_data^2
        "c_nrm": _one_each(_solve_target(objective, zero, one, level)) / objective.sigma_data**2,
        "loss_weight": effective / c_out**2,
        "effective_weight": effective,
        "D": clean(x / scale + on(s, x) * eps, answer),
        "F_target": target,
        "loss": loss,
    }


def _one_each(tensor: Tensor) -> Tensor:
    """Return the first element of each sample."""
    return tensor.flatten(1)[:, 0]


def _solve_target(objective: EDM, x: Tensor, eps: Tensor, level: Level) -> Tensor:
    """Return the prediction at which D is x, in the reference's sign."""
    noisy = on(level.alpha, x) * x + on(level.sigma, x) * eps
    zero, one = torch.zeros_like(x), torch.ones_like(x)

    def clean(prediction: Tensor) -> Tensor:
        view = objective.view(_Fixed(-prediction))  # type: ignore[arg-type]
        found: Tensor = view(noisy, level, Conditioning()).clean
        return found

    base = clean(zero)
    return (x - base) / (clean(one) - base)


def _sampling(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.group("input")
    process = _objective(config).process
    steps, rho = config["sampler"]["num_steps"], config["sampler"]["rho"]
    sampler = Heun(steps, schedule=Karras(rho=rho), precision="float64")
    model = Gaussian(process, inputs["mu"], inputs["s"])
    seeds = torch.arange(len(inputs["latents"]))
    state = sampler.run(model, Conditioning(), seeds, inputs["latents"])
    assert math.isclose(float(model.sigmas[0]), config["sigma_in"] * config["sampler"]["sigma_max"])
    return {"sample_x0": sampler.finish(state)}
