"""What the schedulers of diffusers remember and mean, class by class, and how they are prepared."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import Level
from genscale.objectives.paths import ContinuousVP, VarianceExploding
from genscale.objectives.schedule import DiscreteVP, LinearFlow, NoiseProcess
from genscale.samplers.schedules import noise_ratio

# where a scheduler's sample lives: VP by abar of whole timesteps; alpha 1 (k-diffusion's form, and
# EDM's, whose networks are preconditioned); alpha and sigma by its own rule; 1 - sigma; cos and sin
Family = Literal["vp", "k", "edm", "lambda", "flow", "v"]
# calls of ``step`` in a solver step: one; two and a last one; those of DPM-Solver's orders; PLMS
Form = Literal["one", "pairs", "orders", "plms"]

_TOLERANCE = 1e-3  # of log(sigma / alpha): their tables are float32


@dataclass(frozen=True)
class Kind:
    """One class of diffusers.

    Attributes:
        family: where its sample lives.
        form: how many calls a solver step takes.
        lists: attributes that are lists of tensors, the newest last, with the most entries to
            keep; 0 where the list has a fixed length and holds None in front.
        tensors: attributes that are a tensor or None.
        counters: attributes that are whole numbers.
        eta: ``step`` takes an eta.
        strides: ``step`` goes down N // steps whatever its timesteps are.
        churns: why its ``s_churn`` is refused.
    """

    family: Family
    form: Form = "one"
    lists: tuple[tuple[str, int], ...] = ()
    tensors: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    eta: bool = False
    strides: bool = False
    churns: str = ""


_LATE = "adds the noise after the network was asked, which is not EDM's sampler"
_OUTPUTS = (("model_outputs", 0),)

KINDS: dict[str, Kind] = {
    "DDPMScheduler": Kind("vp"),
    "DDIMScheduler": Kind("vp", eta=True, strides=True),
    "PNDMScheduler": Kind("vp", "plms", lists=(("ets", 3),), strides=True),
    "LCMScheduler": Kind("vp"),
    "TCDScheduler": Kind("vp", eta=True),
    "EulerDiscreteScheduler": Kind("k", churns=_LATE),
    "EulerAncestralDiscreteScheduler": Kind("k"),
    "HeunDiscreteScheduler": Kind("k", "pairs"),
    "KDPM2DiscreteScheduler": Kind("k", "pairs"),
    "KDPM2AncestralDiscreteScheduler": Kind("k", "pairs"),
    "LMSDiscreteScheduler": Kind("k", lists=(("derivatives", 3),)),
    "DPMSolverMultistepScheduler": Kind("lambda", lists=_OUTPUTS, counters=("lower_order_nums",)),
    "DPMSolverSinglestepScheduler": Kind("lambda", "orders"),
    "DEISMultistepScheduler": Kind("lambda", lists=_OUTPUTS, counters=("lower_order_nums",)),
    "UniPCMultistepScheduler": Kind(
        "lambda",
        lists=_OUTPUTS,
        tensors=("last_sample",),
        counters=("lower_order_nums", "this_order"),
    ),
    "SASolverScheduler": Kind(
        "lambda",
        lists=_OUTPUTS,
        tensors=("last_sample", "last_noise"),
        counters=("lower_order_nums", "this_predictor_order", "this_corrector_order"),
    ),
    "IPNDMScheduler": Kind("v", lists=(("ets", 3),)),
    "EDMEulerScheduler": Kind("edm", churns=_LATE),
    "EDMDPMSolverMultistepScheduler": Kind("edm", lists=_OUTPUTS, counters=("lower_order_nums",)),
    "FlowMatchEulerDiscreteScheduler": Kind("flow", churns="takes it and does nothing with it"),
    "FlowMatchHeunDiscreteScheduler": Kind(
        "flow", "pairs", churns="adds the noise of a process with alpha 1 to a flow"
    ),
}
# settings that change how a class is used rather than what it computes, or that hold objects
_REFUSED: dict[str, str] = {
    "solver_p": "a second scheduler, which has a state of its own",
    "tau_func": "a function; the built-in one is used",
    "variance_type=learned": "a learned variance, which sampler=ancestral samples with",
    "variance_type=learned_range": "a learned variance, which sampler=ancestral samples with",
    "skip_prk_steps=False": "Runge-Kutta steps whose middle cannot be left; true begins with PLMS",
    "invert_sigmas=True": "levels counted from the data, which networks here are not asked at",
}
# with flow sigmas these repeat the last level instead of going to the clean one
_NOISY_END = ("DEISMultistepScheduler", "SASolverScheduler")
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scheduler with its timesteps set, and what its calls mean for a process.

    Attributes:
        scheduler: never stepped itself; steps are taken by copies.
        kind: its row of the table.
        starts: ``(num_steps + 1,)`` int64: the call at which a solver step begins.
        form: levels in the scheduler's own form at the beginning of calls, and at the end.
        own: the process's levels of equal signal-to-noise ratio.
        scale: float64: own coefficients over the scheduler's.
        start_std: what unit noise is multiplied with at the start.
    """

    scheduler: Any
    kind: Kind
    starts: Tensor
    form: Level
    own: Level
    scale: Tensor
    start_std: float


def kind_of(name: str) -> Kind:
    """Return the row of a class.

    Raises:
        ConfigError: a class that is not in the table.
    """
    if name not in KINDS:
        known = tuple(KINDS)
        raise ConfigError(
            f"sampler.scheduler must be one of {', '.join(known)}, but is {name!r}."
            f"{did_you_mean(str(name), known) or ' Others keep states that are not known here.'}"
        )
    return KINDS[name]


def check_settings(name: str, config: dict[str, Any]) -> None:
    """Refuse settings the class does not have, ignores, or cannot be resumed with.

    Raises:
        ConfigError: one of those.
    """
    kind, known = kind_of(name), tuple(_parameters(name))
    for key, value in config.items():
        if key in ("s_churn", "s_tmin", "s_tmax", "s_noise") and kind.churns:
            raise ConfigError(
                f"sampler.config.{key} is refused: {name} {kind.churns}. Use sampler=edm with "
                "sampler.churn."
            )
        if key not in known:
            raise ConfigError(
                f"'sampler.config.{key}' is not a setting of {name}."
                f"{did_you_mean(str(key), known) or ' It takes: ' + ', '.join(known) + '.'}"
            )
        if key == "use_flow_sigmas" and value and name in _NOISY_END:
            raise ConfigError(
                f"sampler.config.use_flow_sigmas of {name} is refused: it would end at sigma = 1 / "
                "sampler.steps, with noise in the samples. Leave it out: flows are asked at levels "
                "of equal signal-to-noise ratio."
            )
        why = _REFUSED.get(f"{key}={value}") or (_REFUSED.get(key) if value is not None else None)
        if why:
            raise ConfigError(
                f"sampler.config.{key}={value} of {name} is refused: it means {why}. Leave it out."
            )


@lru_cache(maxsize=64)
def prepare(
    name: str, steps: int, settings: str, mu: float | None, process: NoiseProcess | None
) -> Prepared:
    """Build a scheduler, set its timesteps, and hold its levels against a process.

    Args:
        name: the class.
        steps: what ``set_timesteps`` is given.
        settings: the config as json, checked.
        mu: shift of schedulers with ``use_dynamic_shifting``.
        process: that of the model; None prepares what does not depend on it.

    Raises:
        ConfigError: settings that diffusers refuses, or levels that the process does not have.
    """
    kind, given = kind_of(name), json.loads(settings)
    config = _defaults(name, given, process) | given
    if config.get("use_flow_sigmas"):
        config.setdefault("prediction_type", "flow_prediction")
    _check_prediction(name, kind, config)
    # also where the first caller is elsewhere: the tables live on the CPU and are shared
    with torch.inference_mode(False), torch.device("cpu"):
        scheduler = _built(name, steps, config, mu)
        starts = _starts(scheduler, kind)
        _check_spacing(name, scheduler, kind, steps)
        form = _levels(scheduler, kind)
        own, scale = (form, torch.ones_like(form.alpha))
        if process is not None:
            own, scale = _matched(name, form, process)
        std = getattr(scheduler, "init_noise_sigma", 1.0)
        return Prepared(scheduler, kind, starts, form, own, scale, float(std))


def _parameters(name: str) -> dict[str, Any]:
    parameters = inspect.signature(_class(name).__init__).parameters
    return {key: p.default for key, p in parameters.items() if key != "self"}


def _class(name: str) -> Any:
    import importlib

    # one class at a time: the package loads its parts when they are asked for
    return getattr(importlib.import_module("diffusers"), name)


def _defaults(name: str, given: dict[str, Any], process: NoiseProcess | None) -> dict[str, Any]:
    """Return what differs from the class's own defaults: latents are not clipped, and so on."""
    known = _parameters(name)
    chosen: dict[str, Any] = {
        "clip_sample": False,
        "set_alpha_to_one": True,
        "skip_prk_steps": True,
        "lower_order_final": True,
    }
    if known.get("timestep_spacing") == "leading":
        chosen["timestep_spacing"] = "trailing"  # begins at the noisiest timestep
    if isinstance(process, LinearFlow):
        chosen |= {} if name in _NOISY_END else {"use_flow_sigmas": True}
    elif isinstance(process, DiscreteVP | ContinuousVP) and not any(k in given for k in _BETAS):
        if "beta_start" in known:
            total = given.get("num_train_timesteps", getattr(process, "num_timesteps", 1000))
            chosen |= {"num_train_timesteps": total, "trained_betas": _betas(process, total)}
    elif isinstance(process, VarianceExploding) and kind_of(name).family == "edm":
        chosen |= {"sigma_min": process.sigma_min, "sigma_max": process.sigma_max}
    return {key: value for key, value in chosen.items() if key in known}


def _betas(process: NoiseProcess, total: int) -> list[float]:
    alpha, _ = process.coefficients(torch.arange(total + 1, dtype=torch.float64) / total)
    betas: list[float] = (1.0 - (alpha[1:] / alpha[:-1]) ** 2).tolist()
    return betas


def _check_prediction(name: str, kind: Kind, config: dict[str, Any]) -> None:
    prediction, flow = config.get("prediction_type"), bool(config.get("use_flow_sigmas"))
    if kind.family != "lambda" or prediction not in ("flow_prediction", "v_prediction"):
        return
    if (prediction == "flow_prediction") is not flow:
        raise ConfigError(
            f"sampler.config.prediction_type={prediction} of {name} does not go with "
            f"use_flow_sigmas={str(flow).lower()}: flow_prediction is for flow sigmas, "
            "v_prediction for others. Leave prediction_type out."
        )


def _built(name: str, steps: int, config: dict[str, Any], mu: float | None) -> Any:
    kind = _class(name)
    try:
        scheduler = kind(**config)
        if mu is None:
            scheduler.set_timesteps(steps)
        else:
            if "mu" not in inspect.signature(kind.set_timesteps).parameters:
                raise ValueError("it takes no mu")
            scheduler.set_timesteps(steps, mu=mu)
        return scheduler
    except (ValueError, TypeError, NotImplementedError, IndexError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{name} with sampler.steps={steps} and sampler.config={_shown(config)} could not be "
            f"set up: {reason}. Change these settings."
        ) from error


def _shown(config: dict[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key != "trained_betas"}
    return json.dumps(kept)


def _starts(scheduler: Any, kind: Kind) -> Tensor:
    calls = len(scheduler.timesteps)
    if kind.form == "pairs":
        sizes = [2] * (calls // 2) + [1] * (calls % 2)
    elif kind.form == "plms":
        sizes = [2, *[1] * (calls - 2)] if calls > 1 else [1]
    elif kind.form == "orders":
        begins = [i for i, order in enumerate(scheduler.order_list[:calls]) if order == 1]
        sizes = [b - a for a, b in zip(begins, [*begins[1:], calls], strict=True)]
    else:
        sizes = [1] * calls
    return torch.nn.functional.pad(torch.tensor(sizes).cumsum(0), (1, 0))


def _check_spacing(name: str, scheduler: Any, kind: Kind, steps: int) -> None:
    """Refuse timesteps that are not where the sample of these classes has gone."""
    if not kind.strides:
        return
    total = int(scheduler.config.num_train_timesteps)
    places = scheduler.timesteps.unique().flip(0).tolist()
    if any(a - b != total // steps for a, b in pairwise(places)):
        raise ConfigError(
            f"{name} goes down {total // steps} timesteps at each of sampler.steps={steps} steps, "
            f"but its timesteps are {places[:3]}... Give steps that divide {total}, or use "
            "sampler=ddim, which takes any number."
        )


def _levels(scheduler: Any, kind: Kind) -> Level:
    """Return where the sample lives at the beginning of every call, and at the end."""
    name = type(scheduler).__name__
    if kind.family == "vp":
        table = scheduler.alphas_cumprod.double()
        squares = torch.cat((table[scheduler.timesteps.long()], _last_square(scheduler).view(1)))
        return Level(squares.sqrt(), (1.0 - squares).clamp_min(0.0).sqrt())
    if kind.family == "v":
        return Level(scheduler.alphas.double(), scheduler.betas.double())
    sigma = scheduler.sigmas.double()[: len(scheduler.timesteps) + 1].clone()
    sigma[-1] = scheduler.sigmas[-1]
    if name.startswith("KDPM2"):
        odd = torch.arange(1, len(scheduler.timesteps), 2)
        sigma[odd] = scheduler.sigmas_interpol.double()[odd - int("Ancestral" in name)]
    if kind.family == "flow":
        return Level(1.0 - sigma, sigma)
    if kind.family == "lambda":
        return Level(*scheduler._sigma_to_alpha_sigma_t(sigma))
    return Level(torch.ones_like(sigma), sigma)


def _last_square(scheduler: Any) -> Tensor:
    """Return alpha^2 where VP schedulers end."""
    name, one = type(scheduler).__name__, torch.ones((), dtype=torch.float64)
    if name == "TCDScheduler":
        square: Tensor = scheduler.alphas_cumprod[0].double()
        return square
    if name in ("DDPMScheduler", "LCMScheduler"):
        return one
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    end = int(scheduler.timesteps[-1]) - stride
    last = scheduler.final_alpha_cumprod if end < 0 else scheduler.alphas_cumprod[end]
    return one * last.double()


def _matched(name: str, form: Level, process: NoiseProcess) -> tuple[Level, Tensor]:
    """Return the process's levels of equal signal-to-noise ratio, and their scale over ``form``."""
    ratio = noise_ratio(form)
    most = float(noise_ratio(process.level(process.t_max)))
    high = float(ratio[0])
    above = most < high if math.isinf(high) else math.log(high) > math.log(most) + _TOLERANCE
    if above and (math.isinf(high) or not process.continues_above):
        raise ConfigError(
            f"sampler.scheduler={name} starts at sigma / alpha = {high:.4g}, but the model's "
            f"{type(process).__name__} has levels from {most:.4g} down. Use a scheduler of the "
            "model's own process, such as DPMSolverMultistepScheduler, or sampler=euler."
        )
    time = torch.where(ratio > 0, process.time_of(-torch.log(ratio)), 0.0)
    if not process.continues_above:
        time = time.clamp(max=process.t_max)
    own = process.level(time)
    return own, torch.hypot(own.alpha, own.sigma) / torch.hypot(form.alpha, form.sigma)
