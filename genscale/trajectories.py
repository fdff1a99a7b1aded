"""Runs of samplers on a network, at the size it was trained on or at another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from genscale.backbones.base import Backbone
from genscale.conditioning.base import Conditioning
from genscale.decoding import Decoding
from genscale.guidance.base import Guidance
from genscale.objectives.base import Objective
from genscale.resolution.presets import NoScaling, Preset
from genscale.resolution.sampling import sample_scaled, scaled_guidance
from genscale.samplers.base import Sampler
from genscale.samplers.grid import GridSampler
from genscale.samplers.step_cache import StepCache
from genscale.sizes import Size


@dataclass(frozen=True, slots=True)
class Trajectories:
    """A network at one size, for samplers and searches to run on.

    Attributes:
        model: the network.
        objective: what it was trained for.
        decoding: of its samples.
        shape: ``(C, [T,] H, W)`` of what it is to model: the trained shape, or another.
        step_cache: reuse of features between steps.
        resolution: what lets it work at another size than the trained one.
    """

    model: Backbone
    objective: Objective
    decoding: Decoding
    shape: tuple[int, ...]
    step_cache: StepCache
    resolution: Preset

    @property
    def scales(self) -> bool:
        """Whether anything is done for the sake of the size."""
        return self.shape != self.model.sample_shape and not isinstance(self.resolution, NoScaling)

    @property
    def sides(self) -> tuple[Size, Size]:
        """Trained and wanted height and width of what the network models."""
        native, target = self.model.sample_shape[-2:], self.shape[-2:]
        return (native[0], native[1]), (target[0], target[1])

    def along(self, guidance: Guidance, solver: Sampler) -> Guidance:
        """Return guidance that knows the steps of a sampler."""
        steps = solver.levels(self.objective.process) if isinstance(solver, GridSampler) else None
        return guidance.along(steps)

    def view(self, solver: Sampler, sides: Size | None = None) -> Any:
        """Return the network's view, with step caching as this solver's steps want it."""
        shape = self.shape if sides is None else (*self.shape[:-2], *sides)
        view = self.objective.view(self.model, self.decoding.autoencoder, shape=shape)
        if self.objective.family == "scale_wise":
            return view
        if not isinstance(solver, GridSampler):
            return self.step_cache.wrap(view)
        return self.step_cache.wrap(view, solver.last_level(view.process))

    @contextmanager
    def scaled(self, guidance: Guidance, solver: Sampler) -> Iterator[Guidance]:
        """Put the preset of resolution on the network, and give the guidance of its views."""
        if not self.scales:
            yield guidance
            return
        native, target = self.sides
        process = None if self.objective.family == "scale_wise" else self.objective.process
        with scaled_guidance(
            self.resolution,
            guidance,
            solver,
            process,
            model=self.model,
            native=native,
            target=target,
        ) as scaled:
            yield scaled

    def run(
        self, solver: Sampler, guidance: Guidance, cond: Conditioning, seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run one batch to its end.

        Args:
            solver: the sampler.
            guidance: as :meth:`along` returns it.
            cond: conditions of B samples.
            seeds: ``(B,)`` int64.

        Returns:
            finished samples of the network ``(B, C, [T,] H, W)``, and evaluations ``(B,)``.
        """
        if not self.scales:
            state = solver.run(guidance.wrap(self.view(solver)), cond, seeds)
            return solver.finish(state), state.nfe
        native, target = self.sides
        return sample_scaled(
            solver,
            lambda sides: guidance.wrap(self.view(solver, sides)),
            cond,
            seeds,
            model=self.model,
            native=native,
            target=target,
            preset=self.resolution,
            enlarge=self.decoding.enlarged if self.resolution.enlarge == "pixel" else None,
            images=self.decoding.pictures,
        )
