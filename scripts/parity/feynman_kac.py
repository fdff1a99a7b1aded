"""Parity of Feynman-Kac steering with its own program, whatever that program gets wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.search.official_fk import OfficialSteering
from genscale.search.potentials import PotentialName
from scripts.parity import Case, Comparison

POTENTIALS: dict[str, PotentialName] = {
    "diff": "difference",
    "max": "max",
    "add": "sum",
    "rt": "rt",
    "is": "is",
}


def run(case: Case) -> list[Comparison]:
    """Drive all potentials of the case through all steps; see its ``how``."""
    outputs = case.group("output")
    rtol = float(case.info["tolerance"]["rel"])
    results = []
    for short, name in POTENTIALS.items():
        if f"{short}_weights" not in outputs:
            continue
        for what, got in _drive(case, name).items():
            expected = outputs[f"{short}_{what}"]
            exact = not expected.is_floating_point()
            results.append(
                Comparison(f"{short}_{what}", got, expected, 0.0, 0.0 if exact else rtol)
            )
    return results


def _drive(case: Case, potential: PotentialName) -> dict[str, Tensor]:
    """Return what the case records, ``(T, P)`` each."""
    config, inputs = case.config, case.group("input")
    steering = OfficialSteering(
        1,
        config["num_particles"],
        potential=potential,
        strength=config["lmbda"],
        reward_min=config["reward_min_value"],
        adaptive=config["adaptive_resampling"],
        adaptive_at_end=config["adaptive_resample_at_end"],
    )
    last = config["time_steps"] - 1
    begin, end = config["resampling_t_start"], config["resampling_t_end"]
    due = {*range(begin, end + 1, config["resample_frequency"]), last}
    rows: list[dict[str, Tensor]] = []
    for step in range(config["time_steps"]):
        weights = torch.full_like(inputs["rewards"][:1], -1.0)
        ancestors = torch.full_like(weights, -1, dtype=torch.int64)
        if step in due:
            rewards, uniforms = (inputs[name][step : step + 1] for name in ("rewards", "uniforms"))
            ancestors = steering.step(rewards, uniforms, final=step == last)
            weights = steering.weights
            # a step that did not resample is told by weights of -1
            ancestors = torch.where(weights[:, :1] < 0, -1, ancestors)
        rows.append(
            {
                "weights": weights,
                "ancestors": ancestors,
                "population_rewards": steering.rewards,
                "product": steering.product,
            }
        )
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
