"""Load a trained run or an exported folder and generate from Python.

``sample.py``, ``evaluate.py`` and the training callbacks use this one class, so what the sample
grid shows is what the evaluation measures.

    pipeline = GenerationPipeline.from_run("outputs/latest")
    images = pipeline.generate(num_samples=8, labels=[3, 7], seed=0)   # uint8 (8, C, H, W)

Models of clips make clips ``(8, C, T, H, W)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.conditioning.labels import LabelLaw
from genscale.decoding import Decoding
from genscale.errors import ConfigError
from genscale.generated import Generated
from genscale.guidance.base import Guidance
from genscale.io.images import to_uint8
from genscale.loading import (
    EXPORTED,
    choose_device,
    exported_config,
)
from genscale.pipeline_parts import PipelineParts
from genscale.prompts import prompts_of_set
from genscale.sample_conditions import sample_conditions
from genscale.sample_set import batches_of_set
from genscale.samplers.base import Sampler
from genscale.search.base import SearchResult
from genscale.search.cost import StepCosts, step_costs
from genscale.search.setup import SearchSetup, requests_of, work_of
from genscale.trajectories import Trajectories

__all__ = ["EXPORTED", "Generated", "GenerationPipeline", "choose_device", "exported_config"]


class GenerationPipeline(PipelineParts):
    """A trained model that generates; its arguments are those of :class:`PipelineParts`."""

    def _guidance(self, guidance: Guidance | None, solver: Sampler) -> Guidance:
        """Return guidance, or the pipeline's, ready for the steps of a sampler."""
        return self._trajectories.along(self.ready(guidance or self.guidance), solver)

    @property
    def _decoding(self) -> Decoding:
        """How samples of the network become pictures, now."""
        return Decoding(self.autoencoder, self.upscaling, self._offloaded)

    @property
    def _trajectories(self) -> Trajectories:
        """The network as samplers run on it, now."""
        return Trajectories(
            self.model,
            self.objective,
            self._decoding,
            self.sample_shape,
            self.step_cache,
            self.resolution,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    def sample(
        self,
        cond: Conditioning,
        seeds: Tensor,
        *,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        size: int | Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run one batch of trajectories and decode it.

        Args:
            cond: conditions of B samples.
            seeds: ``(B,)`` int64; a sample is a function of its seed and condition.
            sampler: default is the pipeline's.
            guidance: default is the pipeline's.
            size: of the pictures in pixels; default is the pipeline's.

        Returns:
            images ``(B, C, H, W)``, or clips ``(B, C, T, H, W)``, float32 in about [-1, 1], and
            network evaluations ``(B,)``.
        """
        if size is not None:
            return self.at(size).sample(cond, seeds, sampler=sampler, guidance=guidance)
        solver = sampler or self.sampler
        guided = self._guidance(guidance, solver)
        with self._autocast():
            latents, nfe = self._trajectories.run(solver, guided, cond.to(self.device), seeds)
            images = self._decoding.finished(latents)
        return images.float(), nfe

    def conditions(
        self,
        count: int,
        *,
        labels: Tensor | None = None,
        captions: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        frame_rate: float | None = None,
    ) -> Conditioning:
        """Return the conditions of ``count`` samples as the network reads them.

        The arguments are those of :func:`~genscale.sample_conditions.sample_conditions`; the
        frame rate is the pipeline's where none is given.
        """
        return sample_conditions(
            self.model,
            count,
            labels=labels,
            captions=captions,
            negative_prompt=negative_prompt,
            frame_rate=self.frame_rate if frame_rate is None else frame_rate,
            image_shape=self.decoded_shape,
            text=None if self.text is None else self.text.to(self.device),
        )

    def search(
        self,
        cond: Conditioning,
        seeds: Tensor,
        setup: SearchSetup,
        *,
        captions: Sequence[str] | None = None,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
    ) -> SearchResult:
        """Search for the best sample of each of one batch of prompts.

        Args:
            cond: conditions of G prompts.
            seeds: ``(G,)`` int64 of their plain samples; a result is a function of its seed and
                condition, whatever the other prompts and the micro-batch.
            setup: algorithm, rewards and budget.
            captions: the prompts as texts, for rewards that read them.
            sampler: default is the pipeline's.
            guidance: default is the pipeline's.

        Raises:
            ConfigError: search, sampler, reward, requests or budget do not fit.
        """
        solver = sampler or self.sampler
        guided = self._guidance(guidance, solver)
        runs = self._trajectories
        with self._autocast(), runs.scaled(guided, solver) as scaled:
            return setup.run(
                solver,
                runs.view(solver),
                scaled,
                runs.decoding.finished,
                cond,
                seeds,
                requests=requests_of(captions, cond.labels, len(seeds)),
                work=work_of(self.model, solver, precision=self.precision, shape=self.sample_shape),
            )

    def step_costs(self, cond: Conditioning) -> StepCosts:
        """Return the network evaluations of every step of one sample, guidance counted.

        Args:
            cond: conditions of at least one sample.
        """
        runs, solver = self._trajectories, self.sampler
        with runs.scaled(self._guidance(None, solver), solver) as guidance:
            return step_costs(solver, runs.view(solver), cond, guidance)

    def stream(
        self,
        *,
        num_samples: int,
        labels: LabelLaw = "balanced",
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        frame_rate: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        search: SearchSetup | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Generated]:
        """Yield the samples ``0 .. num_samples - 1`` of a set in batches, in order.

        Sample i is a function of (seed, i) and its label or prompt: neither the batch size nor the
        number of processes changes it. Process ``rank`` of ``world_size`` makes a contiguous share.

        Args:
            num_samples: samples of the set.
            labels: their classes; see :func:`~genscale.conditioning.labels.labels_for`.
            prompts: n texts, of which sample i has number i mod n; where a model reads text and
                none are given, :attr:`example_captions`.
            negative_prompt: text that guidance leads away from, in place of the empty one.
            frame_rate: frames a second that clips are to have; default is the pipeline's.
            seed: of the set.
            batch_size: samples at a time.
            sampler: default is the pipeline's.
            guidance: default is the pipeline's.
            search: spend more on each sample; None samples once.
            rank: number of this process.
            world_size: of so many.

        Raises:
            ConfigError: numbers, labels or prompts that cannot be used.
        """
        wishes = prompts_of_set(
            self.example_captions if prompts is None else prompts,
            given=prompts is not None,
            negative=negative_prompt,
            labels=None if self.num_classes or isinstance(labels, str) else labels,
            encoder=None if self.text is None else self.text.encoder,
            guidance=guidance or self.guidance,
        )
        if search is not None and search.search.returns_many:
            raise ConfigError(
                f"search {search.search.label} returns several samples a prompt, but a set holds "
                "one for each. Choose another search.returns, or call search of the pipeline."
            )
        for wanted in batches_of_set(
            num_samples,
            batch_size,
            labels=labels,
            num_classes=self.num_classes,
            prompts=wishes,
            negative_prompt=negative_prompt,
            frame_rate=frame_rate,
            seed=seed,
            rank=rank,
            world_size=world_size,
        ):
            cond = self.conditions(
                len(wanted.ids),
                labels=wanted.labels,
                captions=wanted.captions,
                negative_prompt=negative_prompt,
                frame_rate=frame_rate,
            )
            if self.references is not None:
                cond = self.references.add(cond, wanted)
            found: SearchResult | None = None
            if search is None:
                images, nfe = self.sample(cond, wanted.seeds, sampler=sampler, guidance=guidance)
            else:
                found = self.search(
                    cond,
                    wanted.seeds,
                    search,
                    captions=wanted.captions,
                    sampler=sampler,
                    guidance=guidance,
                )
                images, nfe = found.images, found.cost.nfe
            yield Generated(
                wanted.ids, to_uint8(images).cpu(), wanted.labels, nfe, wanted.captions, found
            )

    def generate(
        self,
        *,
        num_samples: int | None = None,
        labels: LabelLaw = "balanced",
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        frame_rate: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        size: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Return ``num_samples`` images, uint8 ``(n, C, [T,] H, W)``; see :meth:`stream`.

        ``num_samples`` may be left out where ``prompts`` are given: then one for each. ``size`` is
        that of the pictures in pixels, where it is not the pipeline's.
        """
        if num_samples is None:
            num_samples = len(prompts or ())
        maker = self if size is None else self.at(size)
        batches = maker.stream(
            num_samples=num_samples,
            labels=labels,
            prompts=prompts,
            negative_prompt=negative_prompt,
            frame_rate=frame_rate,
            seed=seed,
            batch_size=batch_size,
            sampler=sampler,
            guidance=guidance,
        )
        return torch.cat([batch.images for batch in batches])
