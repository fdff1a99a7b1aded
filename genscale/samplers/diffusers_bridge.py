"""The schedulers of diffusers as samplers: exact to resume, to select from, and to batch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.memory import put_rows
from genscale.objectives.schedule import NoiseProcess
from genscale.rng import Purpose
from genscale.samplers.base import State
from genscale.samplers.diffusers_tables import Prepared, check_settings, kind_of, prepare
from genscale.samplers.grid import GridSampler, estimates

_LMS_ORDER = 4


class DiffusersSampler(GridSampler):
    """Any scheduler of :data:`~genscale.samplers.diffusers_tables.KINDS`, by its class name.

    What a scheduler remembers of a trajectory (its multistep history and counters) is taken from
    ``State.history`` before a step and put back after it, a row a particle, and the step is taken
    by a copy: the sampler holds settings only. Particles whose steps or counters differ go in
    groups. Where a class calls the network several times in a solver step (Heun, KDPM2, single-step
    DPM-Solver, the start of PNDM), ``advance`` takes the whole step. Noise is keyed, a draw a
    particle; of a step with several draws, ``advance``'s ``noise`` is the last.

    x is in the scheduler's own form: alpha 1 for Euler and its kin, whose ``scale_model_input`` is
    not needed, because the network is asked at its own level of equal signal-to-noise ratio about
    x rescaled to it. A schedule that starts noisier than the model's process is refused.

    Defaults differ from diffusers' where those are traps for latents: no clipping, trailing
    spacing instead of leading, the last alpha 1; betas and flow sigmas are those of the model's
    process. Other traps (churn that is ignored or added too late, timesteps that do not divide)
    are refused. The state is float32, as schedulers keep it. LCM and TCD re-noise, which suits
    distilled models alone, as does ``stochastic_sampling``.

    Args:
        scheduler: class name.
        steps: what ``set_timesteps`` is given: solver steps; for the single-step DPM-Solver,
            evaluations.
        config: settings of the class, where they differ from the defaults.
        eta: of DDIM and TCD.
        mu: shift of schedulers with ``use_dynamic_shifting``.

    Raises:
        ConfigError: an unknown class or setting, or one that diffusers or this class refuses.
    """

    def __init__(
        self,
        scheduler: str = "UniPCMultistepScheduler",
        steps: int = 25,
        *,
        config: dict[str, Any] | None = None,
        eta: float = 0.0,
        mu: float | None = None,
    ) -> None:
        super().__init__(steps)
        kind = kind_of(scheduler)
        check_settings(scheduler, config or {})
        if eta != 0.0 and not (kind.eta and 0.0 <= eta <= 1.0):
            raise ConfigError(
                f"sampler.eta must lie in [0, 1] and belongs to DDIM and TCD, but is {eta} of "
                f"{scheduler}. Leave it 0, or use sampler=ddim."
            )
        self.scheduler = scheduler
        self.eta = float(eta)
        self.mu = mu
        self.kind = kind
        self.settings = json.dumps(config or {}, sort_keys=True)
        probe = prepare(scheduler, steps, self.settings, mu, None)
        self.places = probe.starts
        # fixed lists are as long as the class makes them
        self.lists = {
            name: most or len(getattr(probe.scheduler, name)) for name, most in kind.lists
        }
        self._draws = self._first_step_draws(probe)

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self._draws

    @property
    def label(self) -> str:
        """The class, and its settings where there are any."""
        return self.scheduler if self.settings == "{}" else f"{self.scheduler}{self.settings}"

    @property
    def num_steps(self) -> int:
        """Number of solver steps."""
        return len(self.places) - 1

    def nfe(self, i: int, j: int) -> int:
        """Network evaluations from solver step i to j: the calls of the scheduler."""
        self._check_range(i, j)
        return int(self.places[j] - self.places[i])

    def grid(self, process: NoiseProcess) -> Level:
        """Return the levels of all calls in the scheduler's own form, and where it ends.

        Raises:
            ConfigError: a schedule that the process does not have.
        """
        return self._prepared(process).form

    def _prepared(self, process: NoiseProcess) -> Prepared:
        return prepare(self.scheduler, self.intervals, self.settings, self.mu, process)

    def _place(self, step: Tensor) -> Tensor:
        return self.places[step]

    def _start_std(self, process: NoiseProcess) -> Tensor:
        return torch.tensor([self._prepared(process).start_std], dtype=torch.float64, device="cpu")

    def _evaluate(self, model: Denoiser, state: State) -> State:
        step = state.step[:1] if state.shared_step is not None else state.step
        prediction = self._ask(model, state, state.x, self._place(step), state.memory)
        return state.replace(
            clean=prediction.clean,
            noise=prediction.noise,
            variance=prediction.variance,
            pending=prediction.memory,
            nfe=state.nfe + prediction.cost,
        )

    def _ask(
        self, model: Denoiser, state: State, x: Tensor, call: Tensor, memory: Any
    ) -> Prediction:
        """Ask the network about x at calls ``(B,)`` or ``(1,)``."""
        prepared = self._prepared(self._process_of(state))
        x = x * on(prepared.scale[call], x)
        return model(x, prepared.own.select(call), state.cond, memory)

    def _fresh_history(self, x: Tensor) -> dict[str, Tensor]:
        count = len(self.lists) + len(self.kind.tensors) + len(self.kind.counters)
        if count == 0:
            return {}
        history = {"numbers": torch.zeros((len(x), count), dtype=torch.int64, device="cpu")}
        for name in self._tensor_names():
            history[name] = torch.zeros_like(x)
        return history

    def _tensor_names(self) -> list[str]:
        names = [f"{name}.{k}" for name, most in self.lists.items() for k in range(most)]
        return names + list(self.kind.tensors)

    def _move(self, model: Denoiser, state: State, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        x, cost, _ = self._take(model, state, noise)
        return x, cost

    def _take(
        self, model: Denoiser, state: State, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        alike = state.step[:, None]
        if state.history:
            alike = torch.cat((alike, state.history["numbers"]), 1)
        if bool((alike == alike[:1]).all()):
            return self._solve(model, state, noise)
        rows, kinds = alike.unique(dim=0, return_inverse=True)
        x, cost, history = state.x, torch.zeros_like(state.nfe), state.history
        for k in range(len(rows)):
            index = (kinds == k).nonzero()[:, 0]
            draw = None if noise is None else noise[index.to(noise.device)]
            part, spent, kept = self._solve(model, state.select(index), draw)
            x = x.index_copy(0, index.to(x.device), part)
            cost = cost.index_copy(0, index, spent)
            history = put_rows(history, index, kept)
        return x, cost, history

    def _solve(
        self, model: Denoiser, state: State, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Take one solver step of particles whose steps and counters are alike."""
        prepared, step = self._prepared(self._process_of(state)), int(state.step[0])
        first, end = int(self.places[step]), int(self.places[step + 1])
        scheduler = self._restored(prepared, state, first)
        x, (clean, eps), cost = state.x, estimates(state), torch.zeros_like(state.nfe)
        for call in range(first, end):
            if call > first:
                place = torch.tensor([call], device="cpu")
                out = self._ask(model, state, x, place, state.pending)
                clean, eps, cost = out.clean, out.noise, cost + out.cost
            draw = self._drawing(state, noise, end - 1 - call)
            x = self._call(prepared, scheduler, call, x, (clean, eps), draw)
        return x, cost, self._kept(scheduler, state)

    def _drawing(self, state: State, noise: Tensor | None, back: int) -> Callable[[], Tensor]:
        """Return what draws the noise of a call, ``back`` calls before the last of its step."""
        if back == 0:
            return lambda: self._step_noise(state, noise)
        keys = rng.key(state.seeds, state.lineage, state.step, Purpose.STEP, back)
        return lambda: self._noise(state.x, keys)

    def _call(
        self,
        prepared: Prepared,
        scheduler: Any,
        call: int,
        x: Tensor,
        guess: tuple[Tensor, Tensor],
        draw: Callable[[], Tensor],
    ) -> Tensor:
        """Let a scheduler take one of its steps."""
        output = _model_output(prepared, call, x, *guess)
        options: dict[str, Any] = {"eta": self.eta} if self.kind.eta else {}
        if self.scheduler == "LMSDiscreteScheduler":
            # of the whole step index, it would take coefficients for slopes that were forgotten
            options["order"] = min(len(scheduler.derivatives) + 1, _LMS_ORDER)
        step = _with_draws(type(scheduler).step, draw)
        timestep = prepared.scheduler.timesteps[call]
        moved: Tensor = step(scheduler, output, timestep, x, return_dict=False, **options)[0]
        return moved.to(x.dtype)

    def _restored(self, prepared: Prepared, state: State, call: int) -> Any:
        """Return a copy of the scheduler that remembers what these particles do."""
        base = prepared.scheduler
        scheduler = copy.copy(base)
        if hasattr(base, "_step_index"):
            scheduler._step_index = call
        if hasattr(base, "is_scale_input_called"):
            scheduler.is_scale_input_called = True
        history = state.history
        numbers = history["numbers"][0].tolist() if history else []
        for (name, most), filled in zip(self.lists.items(), numbers, strict=False):
            newest = [history[f"{name}.{k}"] for k in reversed(range(filled))]
            fixed = dict(self.kind.lists)[name] == 0
            setattr(scheduler, name, [None] * (most - filled) * fixed + newest)
        rest = numbers[len(self.lists) :]
        for name, known in zip(self.kind.tensors, rest, strict=False):
            setattr(scheduler, name, history[name] if known else None)
        counters = rest[len(self.kind.tensors) :]
        for name, number in zip(self.kind.counters, counters, strict=False):
            setattr(scheduler, name, number)
        if hasattr(base, "timestep_list"):
            before = [base.timesteps[call - j] if j <= call else None
                      for j in range(len(base.timestep_list), 0, -1)]  # fmt: skip
            scheduler.timestep_list = before
        if self.kind.form == "orders":
            # a step begins at order 1; the list is written to in place
            scheduler.model_outputs = [None] * len(base.model_outputs)
        if self.kind.form == "plms":
            # a particle without slopes begins anew, by a step of order 1
            scheduler.counter = call if numbers[0] > 0 else 0
        return scheduler

    def _kept(self, scheduler: Any, state: State) -> dict[str, Tensor]:
        """Return what particles remember after a step; absent tensors are zero."""
        if not state.history:
            return {}
        kept: dict[str, Tensor] = {}
        numbers: list[int] = []
        for name, most in self.lists.items():
            newest = [item for item in getattr(scheduler, name) if item is not None][::-1][:most]
            numbers.append(len(newest))
            for k in range(most):
                kept[f"{name}.{k}"] = newest[k] if k < len(newest) else torch.zeros_like(state.x)
        for name in self.kind.tensors:
            value = getattr(scheduler, name)
            numbers.append(int(value is not None))
            kept[name] = torch.zeros_like(state.x) if value is None else value
        numbers += [int(getattr(scheduler, name)) for name in self.kind.counters]
        row = torch.tensor([numbers], dtype=torch.int64, device="cpu")
        return {"numbers": row.expand(len(state), -1).clone(), **kept}

    def _first_step_draws(self, prepared: Prepared) -> bool:
        """Take the first step on zeros: what the class refuses is told here.

        Returns:
            whether it drew noise.
        """
        scheduler, drawn = copy.deepcopy(prepared.scheduler), []
        x = torch.zeros((1, 1, 1, 1), device="cpu")
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = 0
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.is_scale_input_called = True

        def draw() -> Tensor:
            drawn.append(True)
            return x

        try:
            for call in range(int(self.places[1])):
                self._call(prepared, scheduler, call, x, (x, x), draw)
        except (ValueError, NotImplementedError, IndexError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ConfigError(
                f"{self.scheduler} refuses sampler.config={self.settings}: {reason}. "
                "Change these settings."
            ) from error
        return bool(drawn)


def _model_output(prepared: Prepared, call: int, x: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Return the estimates as the scheduler expects a network to predict."""
    family, config = prepared.kind.family, prepared.scheduler.config
    alpha, sigma = float(prepared.form.alpha[call]), float(prepared.form.sigma[call])
    if family == "flow":
        return noise - clean
    if family == "edm":
        # D = c_skip x + c_out F, solved for F; v is the same with the other sign
        data = float(config.sigma_data)
        skip = data**2 / (sigma**2 + data**2)
        out = sigma * data / (sigma**2 + data**2) ** 0.5
        sign = 1.0 if config.prediction_type == "epsilon" else -1.0
        return sign * (clean - skip * x) / out
    prediction = "v_prediction" if family == "v" else config.prediction_type
    if prediction == "sample":
        return clean
    if prediction == "flow_prediction":
        return noise - clean
    if prediction == "v_prediction":
        length = (alpha**2 + sigma**2) ** 0.5
        return (alpha * noise - sigma * clean) / length
    return noise


def _with_draws(step: Any, draw: Callable[[], Tensor]) -> Any:
    """Return a scheduler's ``step`` that takes its noise from ``draw``.

    Schedulers draw through ``randn_tensor`` of their module, from torch's generators. Here the
    function sees another one; nothing of diffusers is changed.
    """

    def randn_tensor(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> Tensor:
        return draw().to(device=device, dtype=dtype).view(tuple(shape))

    scope = {**step.__globals__, "randn_tensor": randn_tensor}
    own = FunctionType(step.__code__, scope, step.__name__, step.__defaults__, step.__closure__)
    own.__kwdefaults__ = step.__kwdefaults__
    return own
