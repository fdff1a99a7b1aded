"""Parity of DiT's training loss with learned variance, and of its samplers on a respaced chain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genscale.backbones.base import BackboneOutput
from genscale.backbones.dit import DiT
from genscale.conditioning.base import NULL_LABEL, Conditioning
from genscale.io.converters.dit import config_from_official, from_official
from genscale.objectives.base import Batch, on
from genscale.objectives.ddpm import DDPM
from genscale.rng import Purpose
from genscale.samplers.ancestral import Ancestral
from genscale.samplers.grid import GridSampler
from genscale.samplers.schedules import Discrete
from genscale.samplers.sde import DDIM
from scripts.parity import Case, Comparison


class GivenDraws:
    """The draws of a training batch as a case holds them, in the place of keyed ones."""

    def __init__(self, uniform: Tensor, noise: Tensor) -> None:
        self._uniform, self._noise = uniform, noise

    def uniform(self, purpose: Purpose) -> Tensor:
        """Return the number that becomes the time."""
        return self._uniform

    def normal(self, purpose: Purpose, shape: tuple[int, ...]) -> Tensor:
        """Return the noise."""
        return self._noise


class DoubledNetwork(nn.Module):
    """parity: a network under the official ``forward_with_cfg``.

    The batch holds every sample twice, with its class and with the null class. Both halves are
    evaluated at the first half's x; guidance is of the first three channels alone, and both
    halves get its result.
    """

    def __init__(self, network: DiT, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale
        self.sample_shape = network.sample_shape

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None
    ) -> BackboneOutput:
        """Return the guided prediction of both halves."""
        output: BackboneOutput = self.network(x[: len(x) // 2].repeat(2, 1, 1, 1), t, cond)
        own, null = output.sample[:, :3].chunk(2)
        guided = null + self.scale * (own - null)
        sample = torch.cat((guided.repeat(2, 1, 1, 1), output.sample[:, 3:]), dim=1)
        return BackboneOutput(sample, output.memory, output.aux)


def build(case: Case) -> DiT:
    """Return the network of a case that names its settings ``config.model``."""
    model: DiT = DiT(**config_from_official(case.config["model"], parity=True))
    model.load_state_dict(from_official(case.group("state"), model))
    return model.eval()


def run(case: Case) -> list[Comparison]:
    """Compare noising, loss and both samplers of a case."""
    model, inputs = build(case), case.group("input")
    objective = DDPM(betas="linear", learn_sigma=model.learn_sigma, time_input="timestep")
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        found.update(_losses(objective, model, inputs))
        found.update(_samples(case, objective, model, inputs))
    results = []
    for name, expected in case.group("output").items():
        if name not in found:
            raise KeyError(f"The case holds output/{name}, which this adapter does not know.")
        results.append(case.compare(name, found[name], expected))
    return results


def labels(model: DiT, official: Tensor) -> Conditioning:
    """Translate official class ids, of which the last is the null class."""
    return Conditioning(labels=official.masked_fill(official == model.num_classes, NULL_LABEL))


def _losses(objective: DDPM, model: DiT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    clean, eps = inputs["x0"], inputs["eps"]
    # timestep t is our step t + 1, drawn by any uniform number in [t, t + 1) / N
    uniform = (inputs["t"].double() + 0.5) / objective.num_timesteps
    alpha, sigma = objective.process.coefficients(objective.sample_time(uniform))
    rows: dict[str, list[Tensor]] = {"loss": [], "mse": [], "vb": []}
    for i in range(len(clean)):
        row = slice(i, i + 1)
        batch = Batch(clean[row], labels(model, inputs["y"][row]), torch.arange(1))
        draws: Any = GivenDraws(uniform[row], eps[row])
        out = objective.loss(model, batch, draws)
        rows["loss"].append(out.per_sample[0])
        for name in ("mse", "vb"):
            if name in out.terms:
                rows[name].append(out.terms[name])
    noisy = on(alpha, clean) * clean + on(sigma, clean) * eps
    return {"xt": noisy, **{name: torch.stack(values) for name, values in rows.items() if values}}


def _samples(
    case: Case, objective: DDPM, model: DiT, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    config, respacing = case.config, str(case.config["respacing"])
    steps = int(respacing.removeprefix("ddim"))
    schedule = Discrete("leading" if respacing.startswith("ddim") else "linspace")
    network: Any = DoubledNetwork(model, config["cfg_scale"])
    view, cond = objective.view(network), labels(model, inputs["y2"])
    variance: Any = "learned" if model.learn_sigma else "lower"
    samplers: dict[str, GridSampler] = {
        "sample_ddpm": Ancestral(steps, variance=variance, schedule=schedule),
        "sample_ddim": DDIM(steps, schedule=schedule),
    }
    found: dict[str, Tensor] = {}
    for name, sampler in samplers.items():
        # the official program starts at the unit normal itself
        first = sampler.grid(objective.process).sigma[:1]
        noise = inputs["eps"].repeat(2, 1, 1, 1) / on(first, inputs["eps"])
        state = sampler.start(view, cond, torch.arange(len(noise)), noise)
        for i in range(steps):
            state = sampler.advance(view, state, inputs["ddpm_noise"][i])
        found[name] = sampler.finish(state)
    times = objective.process.time_at(samplers["sample_ddim"].grid(objective.process))
    found["timestep_map"] = (times[:-1].flip(0) * objective.num_timesteps).round().long() - 1
    return found
