"""The Lightning module of every generative model: prepare a batch, ask the objective, step."""

from __future__ import annotations

import copy
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from genscale import rng
from genscale.autoencoders.base import Autoencoder, Variational
from genscale.backbones.base import Backbone
from genscale.conditioning.base import Conditioning
from genscale.flops import count_flops_by_module
from genscale.io.images import from_uint8
from genscale.objectives.base import Batch, Objective
from genscale.rng import Purpose
from genscale.run_weights import key_of
from genscale.training.ema import EMA
from genscale.training.lr_schedule import Schedule
from genscale.training.optim import AdamW
from genscale.training.parallel import clip_gradients, scale_out
from genscale.training.strategy import FullySharded


class GenerativeModule(pl.LightningModule):
    """A backbone, its frozen average, and what is needed to train it.

    Progress is counted in optimizer steps and samples seen. All randomness is keyed by the run's
    seed and each sample's global stream position, so neither the number of processes nor an
    interruption changes the training run.

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
        compile_blocks: compile each block of the backbone in place.
        checkpoint_blocks: recompute activations of blocks in the backward pass.
    """

    def __init__(
        self,
        *,
        model: Backbone,
        autoencoder: Autoencoder,
        objective: Objective,
        optimizer: AdamW,
        lr_schedule: Schedule,
        ema: EMA,
        batch_size: int,
        condition_dropout: float = 0.0,
        seed: int = 0,
        compile_blocks: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.further_averages = nn.ModuleDict(
            {key_of(law.name): copy.deepcopy(self.ema) for law in ema.laws()[1:]}
        )
        # held in a tuple: not a submodule, so that its weights stay out of checkpoints and DDP
        self._frozen = (autoencoder.requires_grad_(False).eval(),)
        self.objective = objective
        self.optimizer_factory = optimizer
        self.lr_schedule = lr_schedule
        self.ema_law = ema
        self.batch_size = batch_size
        self.condition_dropout = condition_dropout
        self.seed = seed
        self.compile_blocks = compile_blocks
        self.checkpoint_blocks = checkpoint_blocks
        self.flops = count_flops_by_module(model, model.sample_shape)  # of one sample's forward
        self.step = 0  # optimizer steps taken, skipped ones included
        self.terms: dict[str, Tensor] = {}  # of the last batch: detached, on the device
        self.counts: dict[str, Tensor] = {}  # running totals beside the terms
        self.gradient_norm: Tensor | None = None

    @property
    def autoencoder(self) -> Autoencoder:
        """The frozen autoencoder, on this module's device."""
        return self._frozen[0].to(self.device)

    @property
    def samples_seen(self) -> int:
        """Training samples consumed so far, over all processes."""
        return self.step * self.batch_size

    def averages(self) -> dict[str, Backbone]:
        """Return all averaged networks by public name: ``ema``, then e.g. ``ema_0.9999``."""
        further = [law.name for law in self.ema_law.laws()[1:]]
        networks = {name: self.further_averages[key_of(name)] for name in further}
        return {"ema": self.ema, **cast(dict[str, Backbone], networks)}

    def update_averages(self) -> None:
        """Move every average towards the model, after optimizer step ``step``."""
        for law, average in zip(self.ema_law.laws(), self.averages().values(), strict=True):
            law.update(average, self.model, self.step)

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

    def train(self, mode: bool = True) -> GenerativeModule:
        """Switch modes; averages always stay in eval mode."""
        super().train(mode)
        self.ema.eval()
        self.further_averages.eval()
        return self

    def on_train_start(self) -> None:
        """Enter training mode whatever mode the model was built in."""
        self.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed torch's own generator by step: drop-out inside a network is then resumable too."""
        micro_step = batch_idx % self.trainer.accumulate_grad_batches
        seed = rng.key(self.seed, self.step, micro_step, self.global_rank, Purpose.NETWORK)
        torch.manual_seed(int(seed) & 0x7FFFFFFFFFFFFFFF)

    @torch.no_grad()
    def prepare(self, raw: dict[str, Tensor]) -> Batch:
        """Turn a raw batch into a training batch.

        Args:
            raw: uint8 ``image`` or the cached ``moments`` of one, ``label`` and ``position``.
        """
        position = raw["position"]
        autoencoder = self.autoencoder
        if isinstance(autoencoder, Variational):
            cached = raw.get("moments")
            moments = autoencoder.moments(from_uint8(raw["image"])) if cached is None else cached
            shape = (autoencoder.latent_channels, *moments.shape[2:])
            noise = rng.for_step(self.seed, position).normal(Purpose.POSTERIOR, shape)
            clean = autoencoder.from_moments(moments.float(), noise)
        else:
            clean = autoencoder.encode(from_uint8(raw["image"]))
        cond = Conditioning(labels=raw["label"]) if "label" in raw else Conditioning()
        if self.condition_dropout > 0 and len(cond):
            draws = rng.for_step(self.seed, position).uniform(Purpose.DROP)
            cond = cond.drop(draws < self.condition_dropout)
        return Batch(clean=clean, cond=cond, position=position)

    def training_step(self, raw: dict[str, Tensor], batch_idx: int) -> Tensor:
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
        self.step += 1
        self.trainer.datamodule.samples_seen = self.samples_seen  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule, stepped once an optimizer step."""
        optimizer = self.optimizer_factory.build(self.model)
        schedule = self.lr_schedule.build(optimizer, self.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store progress and the seed beside the weights."""
        checkpoint["genscale"] = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "seed": self.seed,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue counting where the checkpoint stopped."""
        self.step = int(checkpoint["genscale"]["step"])
