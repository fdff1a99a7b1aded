"""Step caching: inner features of the network are reused, or forecast, at most steps of sampling.

Attention and feed-forward layers put out nearly the same at neighbouring steps. A step cache runs
them at some steps, keeps what they put out, and at the other steps puts the kept features, or a
forecast from them, in their place (:mod:`genscale.backbones.reuse`).

The features live in the ``memory`` that passes through samplers and guidance, with a leading
particle axis. So they follow their particle, each branch of guidance has its own, and nothing is
committed before ``advance``. Which particle reuses depends on its own past alone, never on what
else is in the batch: rows that need the whole network and rows that do not are two forwards.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from genscale.backbones.reuse import eager, recorded, remaining_share, replaced, reusable_modules
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError, did_you_mean
from genscale.layers.norm import upcast
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.memory import STEP_CACHE, cat_tensors, take_rows
from genscale.objectives.network import NetworkView

Basis = Literal["taylor", "newton"]

_TOLERANCE = 1e-9  # of process times, where a level says its signal-to-noise ratio only


class StepCache(ABC):
    """Settings of step caching; holds no features, so one object serves any number of samples.

    Attributes:
        label: what protocols call it, settings included.
    """

    label: str

    @abstractmethod
    def wrap(self, view: Denoiser, last: Level | None = None) -> Denoiser:
        """Return a view of the same signature that reuses features; guidance goes around it.

        Args:
            view: of a network.
            last: where the last step of sampling begins: from there on every evaluation is
                whole. None has no such rule.
        """


class NoStepCache(StepCache):
    """Every evaluation is whole."""

    label = "none"

    def wrap(self, view: Denoiser, last: Level | None = None) -> Denoiser:
        """Return the view itself."""
        return view


class IntervalCache(StepCache):
    """Whole evaluations in a fixed rhythm; the others are made from the latest of them.

    A particle's evaluations count as the sampler commits them, one a step: those after the first
    of a step (Heun's corrector) go by the count of the step they lead to, and are not remembered.
    The count starts again, with a whole evaluation, when a particle's level is no less noisy than
    at its latest whole evaluation, and wherever ``renoise`` or ``forget`` changed x.

    Args:
        interval: one whole evaluation in so many; 1 caches nothing.
        order: how many whole evaluations before the latest a forecast looks back on.
        warm_up: evaluations that are whole before the rhythm begins.

    Raises:
        ConfigError: a number that is not whole, or too small.
    """

    def __init__(self, interval: int, *, order: int, warm_up: int) -> None:
        for name, value, least in (
            ("interval", interval, 1),
            ("order", order, 0),
            ("warm_up", warm_up, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"step_cache.{name} must be a whole number of at least {least}, but is "
                    f"{value!r}. Give e.g. step_cache.{name}={max(least, 2)}."
                )
        self.interval, self.order, self.warm_up = interval, order, warm_up

    def due(self, evaluations: Tensor) -> Tensor:
        """Return whether the evaluation after ``(B,)`` others is whole."""
        beyond = evaluations - (self.warm_up - 1)
        return (beyond <= 0) | (beyond % self.interval == 0)

    @abstractmethod
    def weights(self, times: Tensor, known: Tensor, time: Tensor) -> Tensor:
        """Return what each kept feature counts in the features of another time.

        Args:
            times: ``(B, order + 1)`` float64 times of the kept features, the latest first.
            known: ``(B,)`` how many of them there are.
            time: ``(B,)`` float64.

        Returns:
            ``(B, order + 1)`` float64.
        """

    def wrap(self, view: Denoiser, last: Level | None = None) -> Denoiser:
        """Return the view that reuses features; interval 1 returns the view itself.

        Raises:
            ConfigError: a view that is not a network's own, or a backbone that cannot be looked
                into.
        """
        if self.interval == 1:
            return view
        if not isinstance(view, NetworkView):
            raise ConfigError(
                f"Step caching goes directly around a network, but a {type(view).__name__} was "
                "given. Wrap objective.view(backbone), and put guidance around the result."
            )
        return CachedView(self, view, last)


class FORA(IntervalCache):
    """The latest features are reused as they are (arXiv:2407.01425).

    Args:
        interval: one whole evaluation in so many; the paper has 3 with 250 steps of DDIM.

    Raises:
        ConfigError: an interval that is no whole number of at least 1.
    """

    def __init__(self, interval: int = 3) -> None:
        super().__init__(interval, order=0, warm_up=1)
        self.label = f"fora(interval={interval})"

    def weights(self, times: Tensor, known: Tensor, time: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(times)


class Taylor(IntervalCache):
    """Features are forecast from the last ones by their finite differences (arXiv:2503.06923).

    F_0 = feature, F_k+1 = (F_k - F_k before) / (t - t before), forecast sum_k F_k d^k / k! at a
    distance d, where t is the time of the model's process, in which a step of the usual grid
    always has the same length. As differences are not derivatives, ``basis="taylor"``, the
    paper's, misses polynomials of degree 2 and more. ``"newton"`` (ours) puts Newton's
    polynomial through the same features: exact for every degree up to ``order``, on uneven
    grids too, but steeper where features are noisy.

    Kept are ``order`` + 1 features a module, branch and particle.

    Args:
        interval: one whole evaluation in so many.
        order: highest difference used, at least 1.
        warm_up: evaluations that are whole before the rhythm begins.
        basis: ``"taylor"`` or ``"newton"``.

    Raises:
        ConfigError: an unknown basis, or a number that is not whole or too small.
    """

    def __init__(
        self, interval: int = 4, *, order: int = 1, warm_up: int = 3, basis: Basis = "taylor"
    ) -> None:
        super().__init__(interval, order=order, warm_up=warm_up)
        if order < 1:
            raise ConfigError(
                f"step_cache.order must be at least 1, but is {order}. For order 0, which reuses "
                "features as they are, take step_cache=fora."
            )
        if basis not in get_args(Basis):
            raise ConfigError(
                f"step_cache.basis must be one of {', '.join(get_args(Basis))}, but is {basis!r}."
                f"{did_you_mean(str(basis), get_args(Basis))}"
            )
        self.basis = basis
        self.label = f"{basis}(interval={interval}, order={order}, warm_up={warm_up})"

    def weights(self, times: Tensor, known: Tensor, time: Tensor) -> Tensor:
        """Return the weights of the forecast; differences of unknown features count 0."""
        slots = times.shape[1]
        # [:, i]: F_k as of the i-th last whole evaluation, in terms of the features
        difference = torch.eye(slots, dtype=torch.float64, device="cpu").expand(len(times), -1, -1)
        total = difference[:, 0]
        factor = torch.ones_like(time)
        for k in range(1, slots):
            older = times[:, k:] if self.basis == "newton" else times[:, 1 : slots - k + 1]
            there = torch.arange(slots - k, device="cpu") + k < known[:, None]
            apart = torch.where(there, times[:, : slots - k] - older, 1.0)[..., None]
            difference = (difference[:, :-1] - difference[:, 1:]) / apart
            difference = torch.where(there[..., None], difference, 0.0)
            if self.basis == "newton":
                factor = factor * (time - times[:, k - 1])
            else:
                factor = factor * (time - times[:, 0]) / k
            total = total + factor[:, None] * difference[:, 0]
        return total


class CachedView(Denoiser):
    """A network's view that runs the whole network at some evaluations only.

    Memory is ``{"step_cache": ..., "network": ...}``, the second being what the network handed
    back. The first holds ``evaluations`` ``(B,)`` since the count began, ``known`` ``(B,)``, how
    many features there are, ``times`` ``(B, K)`` of them, and ``features``: by module, K tensors
    ``(B, ...)``, the latest first. The first three are on the CPU.

    A reused evaluation costs the share of operations that it runs.

    Args:
        cache: when to reuse, and how.
        view: the network.
        last: see :meth:`StepCache.wrap`.

    Raises:
        ConfigError: a backbone that cannot be looked into.
    """

    def __init__(self, cache: IntervalCache, view: NetworkView, last: Level | None) -> None:
        self.cache, self.view = cache, view
        self.modules = reusable_modules(view.backbone)
        self.process = view.process
        self.sample_shape = view.sample_shape
        self.device = view.device
        self.last_time = -math.inf
        if last is not None:
            self.last_time = float(view.process.time_at(last)) + _TOLERANCE

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Estimate clean sample and noise of ``x`` in one network call, or two of fewer rows.

        Which rows need the whole network is known on the CPU beforehand.

        Raises:
            ValueError: blocks that would be run again in a backward pass; a module whose output
                has no row a sample, or that runs twice.
        """
        self._check_gradients()
        memory = memory or {STEP_CACHE: None, "network": None}
        time = self.process.time_at(level).expand(len(x))
        begins = self._begins(time, memory[STEP_CACHE])
        whole = begins | (time <= self.last_time)
        if memory[STEP_CACHE] is not None:
            whole = whole | self.cache.due(memory[STEP_CACHE]["evaluations"])
        if bool(whole.all()):
            return self._run(x, level, cond, memory)
        if not bool(whole.any()):
            return self._reuse(x, level, cond, memory)
        parts, places = [], []
        for mask, ask in ((whole, self._run), (~whole, self._reuse)):
            index = mask.nonzero()[:, 0]
            rows = index.to(x.device, non_blocking=True)
            kept = take_rows(memory, index)
            parts.append(ask(x[rows], level.select(index), cond.select(index), kept))
            places.append(index)
        return _joined(parts, torch.cat(places).argsort())

    def _begins(self, time: Tensor, past: dict[str, Any] | None) -> Tensor:
        """Return which rows have no features to look back on, or are not past their level."""
        if past is None:
            return torch.ones(len(time), dtype=torch.bool, device="cpu")
        return (past["evaluations"] == 0) | (time >= past["times"][:, 0])

    def _run(
        self, x: Tensor, level: Level, cond: Conditioning, memory: dict[str, Any]
    ) -> Prediction:
        """Run the whole network and keep its features."""
        backbone = self.view.backbone
        with eager(backbone), recorded(self.modules) as outputs:
            out = self.view(x, level, cond, memory["network"])
        for name, output in outputs.items():
            if len(output) != len(x):
                raise ValueError(
                    f"Step caching keeps a row a sample, but {name} put out {len(output)} rows for "
                    f"{len(x)} samples. Leave it out of {type(backbone).__name__}.cached_modules."
                )
        time = self.process.time_at(level).expand(len(x))
        out.memory = {
            STEP_CACHE: self._keep(outputs, time, memory[STEP_CACHE]),
            "network": out.memory,
        }
        return out

    def _keep(
        self, outputs: dict[str, Tensor], time: Tensor, past: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return what to remember after a whole evaluation."""
        begins, slots = self._begins(time, past), self.cache.order + 1
        one = torch.ones(len(time), dtype=torch.int64, device="cpu")
        if past is None or bool(begins.all()):
            return {
                "evaluations": one,
                "known": one.clone(),
                "times": time[:, None].repeat(1, slots),
                # places not known yet hold the latest, which is finite: they count 0
                "features": {name: (output,) * slots for name, output in outputs.items()},
            }
        older = torch.where(begins[:, None], time[:, None], past["times"][:, :-1])
        features = {
            name: (output, *past["features"][name][:-1]) for name, output in outputs.items()
        }
        if bool(begins.any()):
            device = next(iter(outputs.values())).device
            index = begins.nonzero()[:, 0].to(device, non_blocking=True)
            features = {
                name: (kept[0], *(old.index_copy(0, index, kept[0][index]) for old in kept[1:]))
                for name, kept in features.items()
            }
        return {
            "evaluations": torch.where(begins, 1, past["evaluations"] + 1),
            "known": torch.where(begins, 1, (past["known"] + 1).clamp(max=slots)),
            "times": torch.cat((time[:, None], older), dim=1),
            "features": features,
        }

    def _reuse(
        self, x: Tensor, level: Level, cond: Conditioning, memory: dict[str, Any]
    ) -> Prediction:
        """Run what is left of the network, with features of earlier evaluations."""
        past, backbone = memory[STEP_CACHE], self.view.backbone
        time = self.process.time_at(level).expand(len(x))
        weights = self.cache.weights(past["times"], past["known"], time)
        exact = self.view.dtype == torch.float64
        weights = weights.to(
            device=x.device, dtype=torch.float64 if exact else torch.float32, non_blocking=True
        )

        def forecast(name: str) -> Tensor:
            return _mixed(past["features"][name], weights)

        with eager(backbone), replaced(self.modules, forecast):
            out = self.view(x, level, cond, memory["network"])
        out.cost = out.cost * remaining_share(backbone, tuple(x.shape[1:]))
        out.memory = {
            STEP_CACHE: {**past, "evaluations": past["evaluations"] + 1},
            "network": out.memory,
        }
        return out

    def _check_gradients(self) -> None:
        modules = self.view.backbone.modules()
        if torch.is_grad_enabled() and any(
            getattr(module, "gradient_checkpointing", False) for module in modules
        ):
            raise ValueError(
                "The backbone recomputes blocks in the backward pass, where reused features are no "
                "longer in place. Sample under torch.no_grad(), or build the model without "
                "checkpointing."
            )


def _mixed(kept: tuple[Tensor, ...], weights: Tensor) -> Tensor:
    """Return the weighted sum of features ``(B, ...)``; weights are ``(B, K)``."""
    if len(kept) == 1:
        return kept[0]
    total = on(weights[:, 0], upcast(kept[0])) * kept[0]
    for k, feature in enumerate(kept[1:], start=1):
        total = total + on(weights[:, k], upcast(feature)) * feature
    return total.to(kept[0].dtype)


def _joined(parts: list[Prediction], order: Tensor) -> Prediction:
    """Put the rows of several predictions together, and in order."""
    fields = ("clean", "noise", "memory", "cost", "variance")
    joined = cat_tensors([{name: getattr(part, name) for name in fields} for part in parts])
    return Prediction(**take_rows(joined, order))
