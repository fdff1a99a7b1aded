"""The reverse-time stochastic equation with a diffusion of one's choice, as SiT samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import Denoiser, Level, on
from genscale.objectives.flow import score_diffusion
from genscale.objectives.schedule import NoiseProcess
from genscale.samplers.base import State
from genscale.samplers.grid import GridSampler, Precision, estimates
from genscale.samplers.schedules import LevelSchedule, Linear
from genscale.samplers.sde import GaussianSampler

Diffusion = Literal[
    "constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing", "flow_grpo"
]
Last = Literal["mean", "euler", "tweedie"]

_OFF_PURE_NOISE = 1e-3


def diffusion_of(form: Diffusion, norm: float, process: NoiseProcess, time: Tensor) -> Tensor:
    """Return w_t of dx = (velocity - w score) dt + sqrt(2 w) dW, float64, elementwise.

    With k = ``norm`` and t from 0, data, to 1, noise: ``constant`` k, ``sbdm`` k D (the forward
    equation's own), ``sigma`` k sigma, ``linear`` k t, ``decreasing`` (k cos(pi (1 - t)) + 1)^2
    / 4, ``increasing_decreasing`` k sin(pi t)^2 (arXiv:2401.08740, table 2), and ``flow_grpo``
    k^2 sigma / (2 alpha) (arXiv:2505.05470), which is infinite at pure noise.
    """
    time = time.double()
    alpha, sigma = process.coefficients(time)
    if form == "constant":
        return torch.full_like(time, norm)
    if form == "sbdm":
        return norm * score_diffusion(process, time)
    if form == "sigma":
        return norm * sigma
    if form == "linear":
        return norm * time
    if form == "decreasing":
        return 0.25 * (norm * torch.cos(math.pi * (1.0 - time)) + 1.0) ** 2
    if form == "increasing_decreasing":
        return norm * torch.sin(math.pi * time) ** 2
    return 0.5 * norm**2 * sigma / alpha


@dataclass(frozen=True)
class Tail(LevelSchedule):
    """Uniform times from the start to ``size``, and one last interval from there to 0.

    Args:
        size: length of the last interval.
        away: how far below time 1 to start, where the diffusion is infinite at pure noise.
    """

    size: float
    away: float = 0.0

    def times(self, process: NoiseProcess, intervals: int) -> Tensor:
        """Return the times; a process that does not reach pure noise starts at its own."""
        pure = bool(process.level(process.t_max).alpha == 0)
        start = process.t_max - self.away if pure else process.t_max
        spaced = torch.linspace(start, self.size, intervals, dtype=torch.float64)
        return torch.nn.functional.pad(spaced, (0, 1))


class _Settings(NamedTuple):
    diffusion: Diffusion
    norm: float
    last: Last

    def drift(
        self, process: NoiseProcess, time: Tensor, weight: Tensor, clean: Tensor, noise: Tensor
    ) -> Tensor:
        """Return velocity - w score = alpha' clean + (sigma' + w / sigma) noise."""
        alpha_rate, sigma_rate = process.rates(time)
        _, sigma = process.coefficients(time)
        return on(alpha_rate, clean) * clean + on(sigma_rate + weight / sigma, clean) * noise


class ReverseSDE(GaussianSampler):
    """Euler-Maruyama on dx = (velocity - w score) dt + sqrt(2 w) dW, one evaluation a step.

    Any w keeps the marginals of the process (arXiv:2401.08740, eq. 5); w = 0 is the
    probability-flow equation. The last step, from ``last_size`` to clean data, adds no noise.

    Args:
        steps: N, the last one included; also the number of evaluations.
        diffusion: form of w; see :func:`diffusion_of`. ``flow_grpo`` takes the second level's
            alpha at pure noise.
        norm: size of w; Flow-GRPO has 0.7.
        last: ``"mean"``: the step without its noise; ``"euler"``: without w; ``"tweedie"``: the
            clean estimate.
        last_size: length of the last step in process time; null divides all time evenly, and
            ``shift`` then moves the grid.
        shift: see :class:`~genscale.samplers.grid.GridSampler`.
        precision: see there.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """

    def __init__(
        self,
        steps: int = 250,
        *,
        diffusion: Diffusion = "sigma",
        norm: float = 1.0,
        last: Last = "mean",
        last_size: float | None = 0.04,
        shift: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        schedule = _checked(diffusion, norm, last, last_size, shift)
        super().__init__(steps, schedule=schedule, precision=precision)
        self.settings = _Settings(diffusion, float(norm), last)

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.settings.norm > 0.0

    def transition(self, state: State) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation ``(B,)`` of the next x; see the class."""
        process = self._process_of(state)
        now, then = self._between(state)
        time, end = process.time_at(now), process.time_at(then)
        weight = self._weight(process, now, time)
        final = (state.step == self.num_steps - 1)[: len(time)]
        mean, std = step_law(state, process, time, end, self._last_weight(weight, final))
        if self.settings.last == "tweedie":
            ends = on(final.double(), mean) > 0
            mean = torch.where(ends, estimates(state)[0], mean)
        return mean, torch.where(final, 0.0, std).expand(len(state))

    def _weight(self, process: NoiseProcess, now: Level, time: Tensor) -> Tensor:
        settings = self.settings
        if settings.diffusion != "flow_grpo" or self.num_steps < 2:
            return diffusion_of(settings.diffusion, settings.norm, process, time)
        alpha = torch.where(now.alpha > 0, now.alpha, self.grid(process).alpha[1])
        return 0.5 * settings.norm**2 * now.sigma / alpha

    def _last_weight(self, weight: Tensor, final: Tensor) -> Tensor:
        return torch.where(final, 0.0, weight) if self.settings.last == "euler" else weight


def step_law(
    state: State, process: NoiseProcess, time: Tensor, end: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of one Euler-Maruyama step of an evaluated state.

    Args:
        state: evaluated at ``time``.
        process: whose velocity and score are meant.
        time: ``(B,)`` or ``(1,)`` float64.
        end: where the step goes, earlier.
        weight: w.
    """
    drift = _Settings("constant", 0.0, "mean").drift(process, time, weight, *estimates(state))
    mean = state.x + on(end - time, state.x) * drift
    return mean, torch.sqrt(2.0 * weight * (time - end))


class ReverseSDEHeun(GridSampler):
    """Heun on the equation of :class:`ReverseSDE`, the noise of a step added before it.

    SiT's second-order sampler: x is noised, and then moved by the mean of the drifts at both ends
    of the step. A state stands at the noised x, so that the noise of step i is drawn at the end
    of step i - 1 and that of step 0 is part of the start. Two evaluations a step, one for the
    last: 2 N - 1.

    Args:
        steps: N, the last one included.
        diffusion: see :class:`ReverseSDE`; not ``flow_grpo``.
        norm: see there.
        last: see there.
        last_size: see there.
        precision: see :class:`~genscale.samplers.grid.GridSampler`.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """

    def __init__(
        self,
        steps: int = 125,
        *,
        diffusion: Diffusion = "sigma",
        norm: float = 1.0,
        last: Last = "mean",
        last_size: float = 0.04,
        precision: Precision = "float32",
    ) -> None:
        schedule = _checked(diffusion, norm, last, last_size, 1.0)
        if diffusion == "flow_grpo":
            raise ConfigError(
                "sampler.diffusion=flow_grpo is infinite at pure noise, where Heun needs it. Use "
                "sampler=reverse_sde."
            )
        super().__init__(steps, schedule=schedule, precision=precision)
        self.settings = _Settings(diffusion, float(norm), last)

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.settings.norm > 0.0

    def nfe(self, i: int, j: int) -> int:
        """Network evaluations from step i to step j: 2 a step, 1 for the last of all."""
        self._check_range(i, j)
        return 2 * (j - i) - int(i < j == self.num_steps)

    def _start_std(self, process: NoiseProcess) -> Tensor:
        return torch.hypot(super()._start_std(process), self._noise_stds(process)[:1])

    def _noise_stds(self, process: NoiseProcess) -> Tensor:
        """Return what is added before each step, ``(N + 1,)``; none before the last."""
        time = process.time_at(self.grid(process))
        weight = diffusion_of(self.settings.diffusion, self.settings.norm, process, time[:-2])
        stds = torch.sqrt(2.0 * weight * (time[:-2] - time[1:-1]))
        return torch.nn.functional.pad(stds, (0, 2))

    def _move(self, model: Denoiser, state: State, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        final = state.step == self.num_steps - 1
        if bool(final.all()):
            return self._end(state), torch.zeros_like(state.nfe)
        fresh = self._step_noise(state, noise)
        if not bool(final.any()):
            return self._step(model, state, fresh)
        ends, goes = final.nonzero()[:, 0], (~final).nonzero()[:, 0]
        rows = goes.to(state.x.device)
        part, spent = self._step(model, state.select(goes), fresh[rows])
        x = state.x.index_copy(0, ends.to(state.x.device), self._end(state.select(ends)))
        return x.index_copy(0, rows, part), torch.zeros_like(state.nfe).index_copy(0, goes, spent)

    def _step(self, model: Denoiser, state: State, noise: Tensor) -> tuple[Tensor, Tensor]:
        process, settings, x = model.process, self.settings, state.x
        now, then = self._between(state)
        time, end = process.time_at(now), process.time_at(then)
        weights = [diffusion_of(settings.diffusion, settings.norm, process, t) for t in (time, end)]
        first = settings.drift(process, time, weights[0], *estimates(state))
        length = on(end - time, x)
        out = model(x + length * first, then, state.cond, state.pending)
        second = settings.drift(process, end, weights[1], out.clean, out.noise)
        x = x + 0.5 * length * (first + second)
        step = state.step[:1] if len(time) == 1 else state.step
        return x + on(self._noise_stds(process)[step + 1], x) * noise, out.cost

    def _end(self, state: State) -> Tensor:
        """Return where the last step leads."""
        process, settings = self._process_of(state), self.settings
        clean, noise = estimates(state)
        if settings.last == "tweedie":
            return clean
        now, then = self._between(state)
        time, end = process.time_at(now), process.time_at(then)
        weight = diffusion_of(settings.diffusion, settings.norm, process, time)
        if settings.last == "euler":
            weight = torch.zeros_like(weight)
        drift = settings.drift(process, time, weight, clean, noise)
        return state.x + on(end - time, state.x) * drift


def _checked(
    diffusion: str, norm: float, last: str, last_size: float | None, shift: float
) -> LevelSchedule:
    """Check the settings of the equation and return its grid."""
    for name, value, known in (
        ("diffusion", diffusion, get_args(Diffusion)),
        ("last", last, get_args(Last)),
    ):
        if value not in known:
            raise ConfigError(
                f"sampler.{name} must be one of {', '.join(known)}, but is {value!r}."
                f"{did_you_mean(str(value), known)}"
            )
    if not 0.0 <= norm < math.inf:
        raise ConfigError(f"sampler.norm must not be negative, but is {norm}. 1 is usual.")
    if last_size is None:
        return Linear(shift)
    if not 0.0 < last_size < 1.0 or shift != 1.0:
        raise ConfigError(
            f"sampler.last_size must lie in (0, 1), with sampler.shift=1, but they are {last_size} "
            f"and {shift:g}. SiT has 0.04; null divides time evenly."
        )
    return Tail(float(last_size), _OFF_PURE_NOISE if diffusion == "sbdm" else 0.0)
