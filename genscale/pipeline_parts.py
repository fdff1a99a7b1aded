"""What a pipeline is made of: networks, settings and weights, and the shapes they give."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch

from genscale.assembly import build
from genscale.autoencoders.base import Autoencoder
from genscale.autoencoders.offload import OffloadedDecoder
from genscale.backbones.base import Backbone
from genscale.cascade import References
from genscale.conditioning.low_resolution import LowResolution
from genscale.errors import ConfigError
from genscale.guidance.base import Guidance
from genscale.loading import (
    Stored,
    choose_device,
    parts_of,
    read_exported,
    read_run,
    write_exported,
)
from genscale.objectives.base import Objective
from genscale.resolution.presets import NoScaling, Preset
from genscale.run_weights import MAIN, Origin, is_exported
from genscale.samplers.base import Sampler
from genscale.samplers.step_cache import NoStepCache, StepCache
from genscale.sizes import Size, as_size, shape_at
from genscale.text_cache import TextCache
from genscale.upscaling.stage import Upscaling
from genscale.weak_models import WeakModels


class PipelineParts:
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
        self.weak_models = WeakModels(type(self).load)
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

    def at(self, size: int | Sequence[int] | None) -> Self:
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
    ) -> Self:
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
    def from_config(cls, config: dict[str, Any], model: Backbone | None = None) -> Self:
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
    ) -> Self:
        """Load a run folder or an exported one; see :meth:`from_run`, :meth:`from_pretrained`.

        Raises:
            ConfigError: neither is there, or an exported folder does not hold what is asked for.
        """
        read = read_exported if is_exported(run) else read_run
        return cls._loaded(read(run, checkpoint, weights), device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None) -> Self:
        """Load a folder written by :meth:`save_pretrained`.

        Raises:
            CheckpointError: a file is missing or belongs to another model.
        """
        return cls._loaded(read_exported(folder), device)

    @classmethod
    def _loaded(cls, stored: Stored, device: str | torch.device | None) -> Self:
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

    def to(self, device: str | torch.device | None) -> Self:
        """Move network and autoencoder; None picks CUDA where present."""
        device = choose_device(device)
        self.model.to(device)  # type: ignore[arg-type]
        if self._offloaded is None:
            self.autoencoder.to(device)
            return self
        return self.offload()

    def offload(self) -> Self:
        """Keep the autoencoder in the memory of the CPU except while it decodes.

        Raises:
            ImportError: the package accelerate is not installed.
        """
        self._offloaded = OffloadedDecoder(self.autoencoder, self.device)
        return self

    def ready(self, guidance: Guidance) -> Guidance:
        """Return guidance with the networks that its settings name, on this device."""
        return self.weak_models.lead(guidance, self)
