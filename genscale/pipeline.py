"""Load a trained run or an exported folder and generate from Python.

``sample.py``, ``evaluate.py`` and the training callbacks use this one class, so what the sample
grid shows is what the evaluation measures.

    pipeline = GenerationPipeline.from_run("outputs/latest")
    images = pipeline.generate(num_samples=8, labels=[3, 7], seed=0)   # uint8 (8, C, H, W)

Models of clips make clips ``(8, C, T, H, W)``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from genscale import rng
from genscale.assembly import build
from genscale.autoencoders.base import Autoencoder
from genscale.autoencoders.frames import on_clips
from genscale.autoencoders.offload import OffloadedDecoder
from genscale.backbones.base import Backbone
from genscale.cascade import References, Wanted
from genscale.conditioning.base import Conditioning
from genscale.conditioning.labels import LabelLaw, labels_for
from genscale.conditioning.low_resolution import LowResolution
from genscale.errors import ConfigError
from genscale.generated import Generated
from genscale.guidance.base import Guidance
from genscale.io.images import to_uint8
from genscale.loading import (
    EXPORTED,
    Stored,
    choose_device,
    exported_config,
    parts_of,
    read_exported,
    read_run,
    write_exported,
)
from genscale.objectives.base import Objective
from genscale.prompts import prompts_of_set
from genscale.resolution.presets import NoScaling, Preset
from genscale.resolution.sampling import bicubic, sample_scaled, scaled_guidance
from genscale.run_weights import MAIN, Origin, is_exported
from genscale.sample_conditions import sample_conditions
from genscale.samplers.base import Sampler
from genscale.samplers.grid import GridSampler
from genscale.samplers.step_cache import NoStepCache, StepCache
from genscale.search.base import SearchResult
from genscale.search.cost import StepCosts, step_costs
from genscale.search.setup import SearchSetup, requests_of, work_of
from genscale.sizes import Size, as_size, shape_at
from genscale.text_cache import TextCache
from genscale.upscaling.stage import Upscaling
from genscale.weak_models import WeakModels

__all__ = ["EXPORTED", "Generated", "GenerationPipeline", "choose_device", "exported_config"]


class GenerationPipeline:
    """A backbone, its autoencoder and objective, with default sampler and guidance.

    Args:
        model: the backbone, in eval mode.
        autoencoder: latents -> pixels.
        objective: what the backbone was trained for.
        sampler: default sampler.
        guidance: default guidance.
        num_classes: classes the model knows; 0 for none.
        class_names: their names, for captions.
        text: encodes prompts, where the model reads them.
        example_captions: prompts of the training data's kind, for where none are given.
        frame_rate: frames a second that clips are to have where none are given; None: not known.
        precision: dtype of network and decoder; solver states stay float32.
        step_cache: reuse of the network's features between steps; None reuses nothing.
        size: height and width of the pictures in pixels, or the side of squares; None: as trained.

    Attributes:
        config: the resolved config it was built from, empty where there is none.
        origin: where the weights came from, where they were loaded.
        weak_models: those of autoguidance.
        references: where a model that enlarges takes low-resolution pictures from; None for any
            other one.
        resolution: what lets the network work at another size than the trained one; see
            :mod:`genscale.resolution`. It counts where there is a ``size``.
        upscaling: what enlarges finished samples; None keeps their size. Searches judge what it
            makes.
    """

    def __init__(
        self,
        *,
        model: Backbone,
        autoencoder: Autoencoder,
        objective: Objective,
        sampler: Sampler,
        guidance: Guidance,
        num_classes: int = 0,
        class_names: tuple[str, ...] = (),
        text: TextCache | None = None,
        example_captions: tuple[str, ...] = (),
        frame_rate: float | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        step_cache: StepCache | None = None,
        size: int | Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.autoencoder = autoencoder
        self.objective = objective
        self.sampler = sampler
        self.guidance = guidance
        self.step_cache = step_cache or NoStepCache()
        # data may have classes that the model was not told of
        self.num_classes = num_classes if model.config.get("num_classes") else 0
        self.class_names = class_names
        self.text = text
        self.example_captions = example_captions
        self.frame_rate = frame_rate
        self.config: dict[str, Any] = {}
        self.origin: Origin | None = None
        self.weak_models = WeakModels(GenerationPipeline.load)
        self.references: References | None = None
        self.resolution: Preset = NoScaling()
        self.upscaling: Upscaling | None = None
        self._offloaded: OffloadedDecoder | None = None
        self.set_precision(precision)
        self.set_size(size)

    def set_precision(self, precision: str) -> None:
        """Choose the dtype of network and decoder: ``float32`` or ``bfloat16``."""
        if precision not in ("float32", "bfloat16"):
            raise ConfigError(
                f"precision must be float32 or bfloat16, but {precision!r} was given."
            )
        self.precision = precision

    def set_size(self, size: int | Sequence[int] | None) -> None:
        """Make pictures of another size from now on, in pixels; None: the trained one.

        Raises:
            ConfigError: the network cannot work at that size.
        """
        asked = None if size is None else as_size(size)
        if asked is not None:
            shape = shape_at(self.model, self.autoencoder.downsample, asked)
            asked = None if shape == self.model.sample_shape else asked
        self.size: Size | None = asked
        if self.references is not None:
            self.references = self.references.at(self.decoded_shape)

    def at(self, size: int | Sequence[int] | None) -> GenerationPipeline:
        """Return this pipeline for pictures of another size; networks are shared.

        Raises:
            ConfigError: the network cannot work at that size.
        """
        other = copy.copy(self)
        other.set_size(size)
        return other

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        *,
        checkpoint: str | int | Path = "latest",
        weights: str = MAIN,
        device: str | torch.device | None = None,
    ) -> GenerationPipeline:
        """Load a run folder.

        Args:
            run: folder, for example ``outputs/latest``.
            checkpoint: ``latest``, a step, or a file.
            weights: ``ema``, ``raw``, or another average; see
                :func:`~genscale.run_weights.read_weights`.
            device: default is CUDA where present.

        Raises:
            ConfigError: no run there, or a config that names foreign code.
            CheckpointError: no such checkpoint, damaged, or of another model.
        """
        return cls._loaded(read_run(run, checkpoint, weights), device)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], model: Backbone | None = None
    ) -> GenerationPipeline:
        """Build a pipeline from a resolved config (plain containers), untrained without a model."""
        pipeline = cls(**parts_of(config, model))
        pipeline.config = config
        return pipeline

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        checkpoint: str | int | Path = "latest",
        weights: str = MAIN,
        device: str | torch.device | None = None,
    ) -> GenerationPipeline:
        """Load a run folder or an exported one; see :meth:`from_run`, :meth:`from_pretrained`.

        Raises:
            ConfigError: neither is there, or an exported folder does not hold what is asked for.
        """
        read = read_exported if is_exported(run) else read_run
        return cls._loaded(read(run, checkpoint, weights), device)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device | None = None
    ) -> GenerationPipeline:
        """Load a folder written by :meth:`save_pretrained`.

        Raises:
            CheckpointError: a file is missing or belongs to another model.
        """
        return cls._loaded(read_exported(folder), device)

    @classmethod
    def _loaded(cls, stored: Stored, device: str | torch.device | None) -> GenerationPipeline:
        """Build a pipeline around weights."""
        device = choose_device(device)
        pipeline = cls.from_config(stored.config, model=stored.model(device)).to(device)
        pipeline.origin = stored.origin
        return pipeline

    def save_pretrained(self, folder: str | Path, config: dict[str, Any]) -> None:
        """Write ``model/`` in diffusers' layout and ``genscale.json`` with the rest.

        Args:
            folder: created if missing.
            config: the run's resolved config; only what sampling needs is kept.
        """
        write_exported(self.model, Path(folder), config)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def low_resolution(self) -> LowResolution | None:
        """How the model was trained on references; None where it has none."""
        if not self.model.config.get("reference_channels"):
            return None
        node = self.config.get("low_resolution")
        settings: LowResolution = build(node, path="low_resolution") if node else LowResolution()
        return settings

    @property
    def makes_clips(self) -> bool:
        """Whether samples are clips rather than pictures."""
        return len(self.model.sample_shape) == 4

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of what the network models: ``(C, H, W)``, of clips ``(C, T, H, W)``."""
        if self.size is None:
            return self.model.sample_shape
        return shape_at(self.model, self.autoencoder.downsample, self.size)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape ``(C, H, W)`` of a finished picture, or ``(C, T, H, W)`` of a clip."""
        decoded = self.decoded_shape
        return decoded if self.upscaling is None else self.upscaling.enlarged(decoded)

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """Shape of what the network's samples decode to, before anything enlarges them."""
        channels, *frames, height, width = self.sample_shape
        if frames:  # a sampler may make longer clips than those of the training
            length = self.sampler.noise_shape(self.model)[1]
            frames = [self.autoencoder.latent_to_frames(length)]
        factor = self.autoencoder.downsample
        channels = self.autoencoder.image_channels or channels
        return (channels, *frames, height * factor, width * factor)

    def to(self, device: str | torch.device | None) -> GenerationPipeline:
        """Move network and autoencoder; None picks CUDA where present."""
        device = choose_device(device)
        self.model.to(device)  # type: ignore[arg-type]
        if self._offloaded is None:
            self.autoencoder.to(device)
            return self
        return self.offload()

    def offload(self) -> GenerationPipeline:
        """Keep the autoencoder in the memory of the CPU except while it decodes.

        Raises:
            ImportError: the package accelerate is not installed.
        """
        self._offloaded = OffloadedDecoder(self.autoencoder, self.device)
        return self

    def ready(self, guidance: Guidance) -> Guidance:
        """Return guidance with the networks that its settings name, on this device."""
        return self.weak_models.lead(guidance, self)

    def _guidance(self, guidance: Guidance | None, solver: Sampler) -> Guidance:
        """Return guidance, or the pipeline's, ready for the steps of a sampler."""
        steps = solver.levels(self.objective.process) if isinstance(solver, GridSampler) else None
        return self.ready(guidance or self.guidance).along(steps)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @property
    def _scales(self) -> bool:
        """Whether anything is done for the sake of the size."""
        return self.size is not None and not isinstance(self.resolution, NoScaling)

    def _sides(self) -> tuple[Size, Size]:
        """Return trained and wanted height and width of what the network models."""
        native, target = self.model.sample_shape[-2:], self.sample_shape[-2:]
        return (native[0], native[1]), (target[0], target[1])

    @contextmanager
    def _scaled(self, guided: Guidance, solver: Sampler) -> Iterator[Guidance]:
        """Put the preset of resolution on the network, and give the guidance of its views."""
        if not self._scales:
            yield guided
            return
        native, target = self._sides()
        process = None if self.objective.family == "scale_wise" else self.objective.process
        with scaled_guidance(
            self.resolution,
            guided,
            solver,
            process,
            model=self.model,
            native=native,
            target=target,
        ) as scaled:
            yield scaled

    def _latents(
        self, cond: Conditioning, seeds: Tensor, solver: Sampler, guided: Guidance
    ) -> tuple[Tensor, Tensor]:
        """Return finished samples of the network, and network evaluations ``(B,)``."""
        if not self._scales:
            state = solver.run(guided.wrap(self._view(solver)), cond, seeds)
            return solver.finish(state), state.nfe
        native, target = self._sides()
        return sample_scaled(
            solver,
            lambda sides: guided.wrap(self._view(solver, sides)),
            cond,
            seeds,
            model=self.model,
            native=native,
            target=target,
            preset=self.resolution,
            enlarge=self._enlarge_pixels if self.resolution.enlarge == "pixel" else None,
            images=self._pictures,
        )

    def _pictures(self, latents: Tensor) -> Tensor:
        """Decode, without upscaling."""
        decode = (self._offloaded or self.autoencoder).decode
        return on_clips(self.autoencoder, decode, latents.float())

    def _enlarge_pixels(self, latents: Tensor, sides: Size) -> Tensor:
        """Enlarge the decoded pictures and encode them again."""
        factor = self.autoencoder.downsample
        pictures = bicubic(self._pictures(latents), (sides[0] * factor, sides[1] * factor))
        return self.autoencoder.encode(pictures.clamp(-1.0, 1.0)).to(latents.dtype)

    def _view(self, solver: Sampler, sides: Size | None = None) -> Any:
        """Return the network's view, with step caching as this solver's steps want it."""
        shape = self.sample_shape if sides is None else (*self.sample_shape[:-2], *sides)
        view = self.objective.view(self.model, self.autoencoder, shape=shape)
        if self.objective.family == "scale_wise":
            return view
        if not isinstance(solver, GridSampler):
            return self.step_cache.wrap(view)
        return self.step_cache.wrap(view, solver.last_level(view.process))

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
            latents, nfe = self._latents(cond.to(self.device), seeds, solver, guided)
            images = self._decode(latents)
        return images.float(), nfe

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode, and enlarge where that is asked for."""
        if self.upscaling is None:
            return self._pictures(latents)
        decode = (self._offloaded or self.autoencoder).decode
        return self.upscaling.decode(self.autoencoder, decode, latents.float())

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
        with self._autocast(), self._scaled(guided, solver) as scaled:
            return setup.run(
                solver,
                self._view(solver),
                scaled,
                self._decode,
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
        with self._scaled(self._guidance(None, self.sampler), self.sampler) as guidance:
            return step_costs(self.sampler, self._view(self.sampler), cond, guidance)

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
        if num_samples < 1 or batch_size < 1:
            raise ConfigError(
                f"num_samples and batch_size must be positive, but {num_samples} and {batch_size} "
                "were given."
            )
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
        start, stop = (num_samples * r // world_size for r in (rank, rank + 1))
        for first in range(start, stop, batch_size):
            ids = torch.arange(first, min(first + batch_size, stop))
            classes = labels_for(labels, ids, num_classes=self.num_classes, seed=seed)
            seeds = rng.sample_seeds(seed, first, len(ids))
            captions = None
            if self.text is not None:
                captions = tuple(wishes[i % len(wishes)] for i in ids.tolist())
            cond = self.conditions(
                len(ids),
                labels=classes,
                captions=captions,
                negative_prompt=negative_prompt,
                frame_rate=frame_rate,
            )
            if self.references is not None:
                wanted = Wanted(ids, seeds, classes, captions, negative_prompt, frame_rate)
                cond = self.references.add(cond, wanted)
            found: SearchResult | None = None
            if search is None:
                images, nfe = self.sample(cond, seeds, sampler=sampler, guidance=guidance)
            else:
                found = self.search(
                    cond, seeds, search, captions=captions, sampler=sampler, guidance=guidance
                )
                images, nfe = found.images, found.cost.nfe
            yield Generated(ids, to_uint8(images).cpu(), classes, nfe, captions, found)

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
