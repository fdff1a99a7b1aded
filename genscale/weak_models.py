"""The weak models that autoguidance leads away from, found where its settings say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from genscale.autoencoders.base import Autoencoder
from genscale.backbones.base import Backbone
from genscale.errors import ConfigError
from genscale.guidance.autoguidance import Autoguidance, WeakSettings
from genscale.guidance.base import Guidance
from genscale.guidance.dynamic_threshold import DynamicThreshold
from genscale.objectives.base import Objective
from genscale.run_weights import Origin, is_exported


class Trained(Protocol):
    """What is looked at in a pipeline."""

    model: Backbone
    autoencoder: Autoencoder
    objective: Objective
    num_classes: int
    config: dict[str, Any]
    origin: Origin | None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of what it is asked to make."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""


@dataclass(frozen=True, slots=True)
class WeakModel:
    """A weak model at hand.

    Attributes:
        model: its network, in eval mode.
        objective: what it was trained for.
        name: what protocols call it.
    """

    model: Backbone
    objective: Objective
    name: str


class WeakModels:
    """Weak models by the settings that mean them, loaded when first asked for.

    Args:
        load: loads a run or an exported folder: (run, checkpoint=, weights=, device=) -> pipeline.
    """

    def __init__(self, load: Callable[..., Trained]) -> None:
        self._load = load
        self._known: dict[WeakSettings, WeakModel] = {}

    def add(self, settings: WeakSettings, weak: WeakModel) -> None:
        """Give a model that is at hand already."""
        self._known[settings] = weak

    def find(self, settings: WeakSettings, main: Trained) -> WeakModel:
        """Return the weak model that the settings mean, for a main model.

        Raises:
            ConfigError: it is not said which, it makes other pictures, or it is the main model.
            CheckpointError: there is none such.
        """
        if settings not in self._known:
            self._known[settings] = self._checked(settings, main)
        return self._known[settings]

    def lead(self, guidance: Guidance, main: Trained) -> Guidance:
        """Return autoguidance with its weak model on the main one's device; others as they are."""
        if isinstance(guidance, DynamicThreshold):
            return guidance.around(self.lead(guidance.guidance, main))
        if not isinstance(guidance, Autoguidance):
            return guidance
        shape = main.sample_shape
        if guidance.weak is not None and (
            guidance.weak.sample_shape == shape or guidance.settings not in self._known
        ):
            return guidance
        weak = self.find(guidance.settings, main)
        weak.model.to(main.device)  # type: ignore[arg-type]
        return guidance.led_by(weak.objective.view(weak.model, shape=shape), weak.name)

    def _checked(self, settings: WeakSettings, main: Trained) -> WeakModel:
        run, checkpoint = settings.run, settings.checkpoint
        if run is None:
            if main.origin is None or is_exported(main.origin.run):
                raise ConfigError(
                    "Autoguidance leads away from a weak model, but guidance.weak_run is not given "
                    "and what is sampled is no run with other weights. Give "
                    "guidance.weak_run=<folder>."
                )
            run = str(main.origin.run)
            if checkpoint is None:
                checkpoint = main.origin.checkpoint
        chosen = "latest" if checkpoint is None else checkpoint
        weak = self._load(run, checkpoint=chosen, weights=settings.weights, device=main.device)
        name = str(weak.origin)
        ours, theirs = _pictures(main), _pictures(weak)
        if ours != theirs:
            raise ConfigError(
                f"The weak model of guidance ({name}) makes other pictures: {theirs}, but the "
                f"model makes {ours}. Give guidance.weak_run of one trained on the same data."
            )
        if _is_same(main.model, weak.model):
            raise ConfigError(
                f"The weak model of guidance ({name}) is the model itself, weight by weight. Give "
                "guidance.weak_run=<folder>, guidance.weak_checkpoint=<earlier step> or "
                "guidance.weak_weights=<another average>."
            )
        return WeakModel(weak.model, weak.objective, name)


def _pictures(pipeline: Trained) -> str:
    """Describe what a pipeline makes, as far as it is known."""
    data = (pipeline.config.get("data_info") or {}).get("name", "unknown data")
    shape = "x".join(map(str, pipeline.model.sample_shape))
    latents = type(pipeline.autoencoder).__name__
    return f"{shape} of {latents}, {pipeline.num_classes} classes of {data}"


def _is_same(one: Backbone, other: Backbone) -> bool:
    """Whether two networks have the same weights."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and torch.equal(first[name], second[name])
        for name in first
    )
