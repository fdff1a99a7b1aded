"""The Lightning module of every generative model: prepare a batch, ask the objective, step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from genscale import rng
from genscale.autoencoders.base import Autoencoder, ScaleTokenizer, Variational
from genscale.autoencoders.frames import on_clips
from genscale.backbones.base import Backbone
from genscale.conditioning.base import Conditioning
from genscale.conditioning.low_resolution import LowResolution
from genscale.errors import DataError
from genscale.flops import count_flops_by_module
from genscale.io.images import from_uint8
from genscale.objectives.base import Batch, Objective
from genscale.rng import Purpose
from genscale.text_cache import TextCache
from genscale.training.ema import EMA
from genscale.training.lr_schedule import Schedule
from genscale.training.optim import OptimizerFactory
from genscale.training.parallel import clip_gradients, scale_out
from genscale.training.step_module import StepModule
from genscale.training.strategy import FullySharded


class GenerativeModule(StepModule):
    """A backbone, its frozen average, and what is needed to train it.

    Args:
        model: the backbone.
        autoencoder: pixels <-> latents; frozen and not part of the checkpoint.
        objective: the loss.
        optimizer: factory of the optimizer.
        lr_schedule: factor of the learning rate by step.
        ema: law of the weight average, or of several.
        batch_size: samples of one optimizer step over all processes.
        condition_dropout: share of samples trained with the null condition.
        seed: seed of everything random.
        text: encodes captions, where the model reads them; frozen and not part of the checkpoint.
        low_resolution: how references are made of pictures, for a model that enlarges
            (``reference_channels`` above 0); None is the usual way.
        compile_blocks: compile each block of the backbone in place.
        checkpoint_blocks: recompute activations of blocks in the backward pass.
    """

    def __init__(
        self,
        *,
        model: Backbone,
        autoencoder: Autoencoder,
        objective: Objective,
        optimizer: OptimizerFactory,
        lr_schedule: Schedule,
        ema: EMA,
        batch_size: int,
        condition_dropout: float = 0.0,
        seed: int = 0,
        text: TextCache | None = None,
        low_resolution: LowResolution | None = None,
        compile_blocks: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__(
            model=model,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            ema=ema,
            batch_size=batch_size,
            seed=seed,
        )
        # held in a tuple: not a submodule, so that its weights stay out of checkpoints and DDP
        self._frozen = (autoencoder.requires_grad_(False).eval(),)
        self._text = text
        self.low_resolution = low_resolution or LowResolution()
        self.objective = objective
        self.condition_dropout = condition_dropout
        self.compile_blocks = compile_blocks
        self.checkpoint_blocks = checkpoint_blocks
        self.flops = count_flops_by_module(model, model.sample_shape)  # of one sample's forward

    @property
    def autoencoder(self) -> Autoencoder:
        """The frozen autoencoder, on this module's device."""
        return self._frozen[0].to(self.device)

    @property
    def text(self) -> TextCache | None:
        """The frozen text encoder, on this module's device; None where the model reads no text."""
        return None if self._text is None else self._text.to(self.device)

    def configure_model(self) -> None:
        """Recompute, compile and shard blocks in place; Lightning may call this more than once."""
        strategy = None if self._trainer is None else self.trainer.strategy
        scale_out(
            self.model,
            list(self.averages().values()),
            checkpoint_blocks=self.checkpoint_blocks,
            compile_blocks=self.compile_blocks,
            shards=strategy.shards if isinstance(strategy, FullySharded) else None,
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed torch's own generator by step: drop-out inside a network is then resumable too."""
        micro_step = batch_idx % self.trainer.accumulate_grad_batches
        self.seed_network(micro_step)

    @torch.no_grad()
    def prepare(self, raw: dict[str, Any]) -> Batch:
        """Turn a raw batch into a training batch.

        Args:
            raw: uint8 ``image`` or the cached ``moments`` of one, ``label`` and ``position``, of
                clips ``(B, C, T, H, W)`` also ``frame_rate`` ``(B,)``; for
                models that read text also ``caption``, a list of texts.

        Raises:
            DataError: the model reads text, and there are no captions.
        """
        position = raw["position"]
        autoencoder = self.autoencoder
        features = None
        if isinstance(autoencoder, ScaleTokenizer):
            clean = autoencoder.tokens(from_uint8(raw["image"]))
            features = autoencoder.features(clean)
        elif isinstance(autoencoder, Variational):
            cached = raw.get("moments")
            moments = cached
            if moments is None:
                moments = on_clips(autoencoder, autoencoder.moments, from_uint8(raw["image"]))
            shape = (autoencoder.latent_channels, *moments.shape[2:])
            noise = rng.for_step(self.seed, position).normal(Purpose.POSTERIOR, shape)
            clean = autoencoder.from_moments(moments.float(), noise)
        else:
            clean = on_clips(autoencoder, autoencoder.encode, from_uint8(raw["image"]))
        cond = self._condition(raw)
        if self.condition_dropout > 0 and len(cond):
            draws = rng.for_step(self.seed, position).uniform(Purpose.DROP)
            cond = cond.drop(draws < self.condition_dropout)
        return Batch(
            clean=clean,
            cond=cond,
            position=position,
            features=features,
            samples_seen=self.samples_seen,
        )

    def _condition(self, raw: dict[str, Any]) -> Conditioning:
        """Return the conditions of a raw batch: what is asked for, and how it is shown."""
        frame_rate, size = raw.get("frame_rate"), None
        if self.model.config.get("reads_size"):
            if "image" in raw:
                sides = tuple(raw["image"].shape[-2:])
            else:
                sides = tuple(s * self.autoencoder.downsample for s in raw["moments"].shape[-2:])
            rows = (len(raw["position"]), 1)
            # filled on the device: nothing waits for the host
            columns = [torch.full(rows, float(side), device=self.device) for side in sides]
            size = torch.cat(columns, dim=1)
        reference, level = self._reference(raw)
        return replace(
            self._wish(raw),
            frame_rate=frame_rate,
            size=size,
            reference=reference,
            reference_level=level,
        )

    def _reference(self, raw: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Return what a model that enlarges is given of the pictures themselves; else nothing."""
        if not self.model.config.get("reference_channels"):
            return None, None
        if "image" not in raw:
            raise DataError(
                "The model enlarges reduced pictures, but batches carry cached latents alone. "
                "Train it on the pictures themselves."
            )
        draws = rng.for_step(self.seed, raw["position"])
        return self.low_resolution.of_data(from_uint8(raw["image"]), draws)

    def _wish(self, raw: dict[str, Any]) -> Conditioning:
        """Return what a raw batch asks for: labels, captions, or both."""
        text = self.text
        if text is None:
            return Conditioning(labels=raw["label"]) if "label" in raw else Conditioning()
        if "caption" not in raw:
            raise DataError(
                "The model reads text, but batches carry no captions. Choose data with captions, "
                "and set with_captions on its data module."
            )
        knows_classes = bool(self.model.config.get("num_classes"))
        return text.condition(raw["caption"], labels=raw.get("label") if knows_classes else None)

    def training_step(self, raw: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss; its terms wait on the device until the next log."""
        batch = self.prepare(raw)
        out = self.objective.loss(self.model, batch, rng.for_step(self.seed, batch.position))
        self.terms = {"loss": out.loss.detach(), **out.terms}
        return out.loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, keep the norm, and mark a non-finite step to be skipped.

        Gradients are already reduced, so every process sees the same norm and skips together.
        """
        limit = float(gradient_clip_val or 0.0) or float("inf")
        self.gradient_norm = clip_gradients(self.model.parameters(), limit)
        # read by fused optimizers on the device: no host sync to skip a step
        optimizer.found_inf = (~torch.isfinite(self.gradient_norm)).float()  # type: ignore[attr-defined]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then count: callbacks of this batch see the new count."""
        super().optimizer_step(*args, **kwargs)
        self.count_step()

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule, stepped once an optimizer step."""
        optimizer = self.optimizer_factory.build(self.model)
        schedule = self.lr_schedule.build(optimizer, self.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
