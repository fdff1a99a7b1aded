"""Parity of solvers on a known mixture: k-diffusion, EDM and its ablations, stacked generators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.objectives.paths import ContinuousVP, VarianceExploding
from genscale.objectives.schedule import NoiseProcess
from genscale.samplers.churn import ChurnSampler
from genscale.samplers.grid import GridSampler
from genscale.samplers.multistep import DPMSolverMultistep
from genscale.samplers.ode import DPM2, Euler, Heun
from genscale.samplers.runge_kutta import RungeKutta
from genscale.samplers.schedules import (
    Exponential,
    Given,
    Karras,
    LevelSchedule,
    VPSpaced,
    level_grid,
)
from genscale.samplers.sde import DDIM
from genscale.samplers.single_step import DPMSolver2S
from scripts.parity import Case, Comparison
from scripts.parity.analytic import Mixture
from scripts.parity.edm import run_churned

# the spec of these cases allows deterministic solvers in float32 as much
_FLOAT32 = 5e-5


def run(case: Case) -> list[Comparison]:
    """Run a case of generators, of k-diffusion's solvers (``input/sigmas``), or of EDM's."""
    inputs = case.group("input")
    if "seeds" in inputs:
        return _run_generators(case)
    return _run_k_diffusion(case) if "sigmas" in inputs else _run_edm(case)


def _run_generators(case: Case) -> list[Comparison]:
    seeds, outputs = case.group("input")["seeds"], case.group("output")
    shape = tuple(case.config["shape"])
    results = []
    # all seeds, and a reversed part of them: rows belong to their seed
    for name, rows in (("", slice(None)), (" (part)", torch.arange(len(seeds) - 1, 0, -2))):
        draws = rng.stacked(seeds[rows])
        found = {"first": draws.normal(shape), "randint_1000": draws.integers(1000)}
        found["second"] = draws.normal(shape)
        for key, expected in outputs.items():
            results.append(Comparison(key + name, found[key], expected[rows], 0.0, 0.0))
    return results


class _Runs:
    """The runs of a case, on fresh denoisers."""

    def __init__(self, case: Case) -> None:
        self.inputs, self.shape = case.group("input"), tuple(case.config["shape"])

    def model(self, process: NoiseProcess) -> Mixture:
        parts = (self.inputs[name] for name in ("means", "stds", "weights"))
        return Mixture(process, self.shape, *parts)

    def plain(self, sampler: GridSampler, process: NoiseProcess) -> tuple[Tensor, Mixture]:
        """Sample; each step that draws noise takes the next draw of the case."""
        model, latents = self.model(process), self.inputs["noise"]
        state = sampler.start(model, Conditioning(), torch.arange(len(latents)), latents)
        draws = self.inputs["step_noise"]
        for i in range(sampler.num_steps):
            state = sampler.advance(model, state, draws[i])
        return sampler.finish(state), model

    def churned(self, sampler: ChurnSampler, process: NoiseProcess) -> tuple[Tensor, Mixture]:
        """Sample with the i-th draw before step i."""
        model = self.model(process)
        levels = level_grid(process, sampler.schedule, sampler.intervals)
        draws = self.inputs["step_noise"]
        return run_churned(sampler, model, levels, self.inputs["noise"], draws), model


def _run_k_diffusion(case: Case) -> list[Comparison]:
    config, sigmas = case.config, case.group("input")["sigmas"]
    process = VarianceExploding(float(sigmas[-2]), float(sigmas[0]))
    steps, eta, churn = config["steps"], config["eta"], config["churn"]
    common: dict[str, Any] = {"schedule": Given(tuple(sigmas.tolist())), "precision": "float64"}
    noisy = {
        "churn": churn["s_churn"],
        "churn_min": churn["s_tmin"],
        "churn_max": float(churn["s_tmax"]),
        "churn_noise": churn["s_noise"],
    }
    solvers: dict[str, GridSampler] = {
        "euler": Euler(steps, **common),
        "heun": Heun(steps, **common),
        "dpm_2": DPM2(steps, **common),
        "euler_churn": Euler(steps, **noisy, **common),
        "heun_churn": Heun(steps, **noisy, **common),
        "dpm_2_churn": DPM2(steps, **noisy, **common),
        "euler_ancestral": DDIM(steps, eta=eta, **common),
        "dpmpp_2s_ancestral": DPMSolver2S(steps, eta=eta, **common),
        "dpmpp_2m": DPMSolverMultistep(steps, **common),
        "dpmpp_2m_sde": DPMSolverMultistep(steps, eta=eta, **common),
        "dpmpp_2m_sde_heun": DPMSolverMultistep(steps, eta=eta, correction="heun", **common),
        "dpmpp_3m_sde": DPMSolverMultistep(steps, order=3, eta=eta, **common),
    }
    runs, results = _Runs(case), []
    for name, expected in case.group("output").items():
        kind = name.removeprefix("f32_").removesuffix("_trajectory").removesuffix("_denoised")
        sampler = solvers[kind]
        if name.startswith("f32_"):
            sampler = type(sampler)(steps, schedule=sampler.schedule)
        if isinstance(sampler, ChurnSampler) and sampler.churn.amount > 0.0:
            got, model = runs.churned(sampler, process)
        else:
            got, model = runs.plain(sampler, process)
        if name.endswith("_trajectory"):
            got = torch.stack(model.inputs)
        elif name.endswith("_denoised"):
            stages = sampler.nfe(0, 1) if sampler.num_steps > 1 else 1
            got = torch.stack(model.answers[::stages])
        atol = _FLOAT32 if name.startswith("f32_") else _tolerance(case)
        results.append(Comparison(name, got, expected, atol, 0.0))
        spent = len(model.sigmas)
        if name in case.info.get("nfe", {}):
            counted = torch.tensor(spent)
            given = torch.tensor(case.info["nfe"][name])
            results.append(Comparison(f"nfe {name}", counted, given, 0.0, 0.0))
    schedule = _schedule_of(config)
    if schedule is not None:
        level = level_grid(process, schedule, steps)
        # the official tables are float32
        results.append(Comparison("sigmas", level.sigma, sigmas, 0.0, 1e-5))
    return results


def _schedule_of(config: dict[str, Any]) -> LevelSchedule | None:
    low, high = config["sigma_min"], config["sigma_max"]
    if config["schedule"] == "karras":
        return Karras(low, high, config["rho"])
    if config["schedule"] == "exponential":
        return Exponential(low, high)
    if config["schedule"] == "polyexponential":
        return Exponential(low, high, config["rho"])
    return VPSpaced() if config["schedule"] == "vp" else None


def _run_edm(case: Case) -> list[Comparison]:
    config, churn = case.config, case.config["churn"]
    steps, low, high = config["num_steps"], config["sigma_min"], config["sigma_max"]
    process = VarianceExploding(low, high)
    common: dict[str, Any] = {
        "schedule": Karras(low, high, config["rho"]),
        "precision": "float64",
    }
    noisy = Heun(
        steps,
        churn=churn["S_churn"],
        churn_min=churn["S_min"],
        churn_max=float(churn["S_max"]),
        churn_noise=churn["S_noise"],
        **common,
    )
    runs, results = _Runs(case), []
    for name, expected in case.group("output").items():
        spent = None
        if name == "edm_sigmas":
            got = level_grid(process, common["schedule"], steps).sigma
        elif name == "edm_heun":
            got, model = runs.plain(Heun(steps, **common), process)
            spent = len(model.sigmas)
        elif name == "edm_heun_churn":
            got, model = runs.churned(noisy, process)
            spent = len(model.sigmas)
        else:
            sampler, path = _ablation(name, steps)
            got, model = runs.plain(sampler, path)
            spent = len(model.sigmas)
        results.append(Comparison(name, got, expected, _tolerance(case), 0.0))
        if spent is not None and name in case.info.get("nfe", {}):
            given = torch.tensor(case.info["nfe"][name])
            results.append(Comparison(f"nfe {name}", torch.tensor(spent), given, 0.0, 0.0))
    return results


def _ablation(name: str, steps: int) -> tuple[GridSampler, NoiseProcess]:
    """Return what ``abl_<process>_<solver>[_alphaNNN]`` stands for, in its own sigma range."""
    kind, solver, *rest = name.removeprefix("abl_").split("_")
    share = int(rest[0].removeprefix("alpha")) / 100.0 if rest else 1.0
    common: dict[str, Any] = {"precision": "float64"}
    if kind in ("vp", "ve"):
        # integrated in the process's own time, in which paths bend
        if share != 1.0 or solver not in ("euler", "heun"):
            raise KeyError(f"The case holds output/{name}, which this adapter does not know.")
        path: NoiseProcess = ContinuousVP()
        common["schedule"] = VPSpaced()
        if kind == "ve":
            path, common["schedule"] = VarianceExploding(0.02, 100.0, 0.5), Exponential()
        return RungeKutta(steps, method="euler" if solver == "euler" else "heun", **common), path
    if kind == "iddpm":
        sigmas = _iddpm_sigmas(steps)
        path = VarianceExploding(sigmas[-2], sigmas[0])
        common["schedule"] = Given(tuple(sigmas))
    else:
        path, common["schedule"] = VarianceExploding(0.002, 80.0), Karras()
    if solver == "euler":
        return Euler(steps, **common), path
    return Heun(steps, midpoint=share, **common), path


def _iddpm_sigmas(
    steps: int, low: float = 0.002, high: float = 81.0, c1: float = 1e-3, c2: float = 8e-3
) -> list[float]:
    """Return ``steps`` noise levels of the cosine schedule and 0 (arXiv:2206.00364, table 1)."""
    total = 1000
    # parity: the official products of alpha are float32, the levels made from them float64
    index = torch.arange(total + 1)
    alpha_bar = (0.5 * math.pi * index / total / (c2 + 1.0)).sin() ** 2
    ratios = (alpha_bar[:-1] / alpha_bar[1:]).clamp_min(c1).tolist()
    levels = [0.0] * (total + 1)
    for j in range(total, 0, -1):
        ratio = ratios[j - 1]
        levels[j - 1] = math.sqrt((levels[j] ** 2 + 1.0) / ratio - 1.0)
    inside = torch.tensor([u for u in levels if low <= u <= high], dtype=torch.float64)
    place = torch.linspace(0.0, len(inside) - 1.0, steps, dtype=torch.float64).round().long()
    return [*inside[place].tolist(), 0.0]


def _tolerance(case: Case) -> float:
    return float(case.info["tolerance"]["float64"])
