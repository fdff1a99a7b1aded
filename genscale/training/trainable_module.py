"""The Lightning module of everything trained that is no backbone: one optimizer a group."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from genscale import rng
from genscale.io.images import from_uint8
from genscale.training.ema import EMA
from genscale.training.lr_schedule import Schedule
from genscale.training.optim import OptimizerFactory
from genscale.training.parallel import clip_gradients
from genscale.training.step_module import StepModule
from genscale.training.trainable import MODEL, GroupLosses, PictureBatch, Trainable, all_reduce


class TrainableModule(StepModule):
    """A :class:`~genscale.training.trainable.Trainable` and its optimizers.

    Optimisation is manual: every group's loss is differentiated by that group's parameters alone,
    gradients are averaged over the processes, and all groups step together. Data parallelism is
    done here rather than by hooks on a wrapper, because several backward passes make one step.

    Args:
        trainable: what is trained.
        optimizer: factory of the optimizers, one a group.
        lr_schedule: factor of the learning rates by step.
        ema: law of the average, or of several, of the trainable's model.
        batch_size: samples of one optimizer step over all processes.
        gradient_clip: largest norm of a group's gradient; None clips nothing.
        accumulate: micro-batches of one optimizer step on each process.
        seed: seed of everything random.
    """

    def __init__(
        self,
        *,
        trainable: Trainable,
        optimizer: OptimizerFactory,
        lr_schedule: Schedule,
        ema: EMA,
        batch_size: int,
        gradient_clip: float | None = None,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model=trainable.model,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            ema=ema,
            batch_size=batch_size,
            seed=seed,
        )
        self.automatic_optimization = False
        self.trainable = trainable
        self.gradient_clip = float(gradient_clip or 0.0) or float("inf")
        self.accumulate = accumulate
        self._micro_step = 0  # checkpoints are written between steps, where it is 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed torch's own generator; see :meth:`StepModule.seed_network`."""
        self.seed_network(self._micro_step)

    def training_step(self, raw: dict[str, Tensor], batch_idx: int) -> None:
        """Add a micro-batch's gradients; with the last one of a step, step."""
        batch = PictureBatch(
            images=from_uint8(raw["image"]),
            position=raw["position"],
            step=self.step,
            size=self.batch_size,
        )
        out = self.trainable.losses(batch, rng.for_step(self.seed, batch.position))
        self._add_gradients(out)
        self.terms = {"loss": out.by_group[MODEL].detach(), **out.terms}
        self._micro_step += 1
        if self._micro_step == self.accumulate:
            self._micro_step = 0
            self._take_step(list(out.by_group))

    def _add_gradients(self, out: GroupLosses) -> None:
        """Differentiate every loss by its own group; graphs may be shared between losses."""
        for number, (name, loss) in enumerate(out.by_group.items(), start=1):
            parameters = self._learning(name)
            gradients = torch.autograd.grad(
                loss / self.accumulate,
                parameters,
                retain_graph=number < len(out.by_group),
                allow_unused=True,
            )
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    # strides are the parameter's: fused optimizers go by memory, not by index
                    held = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = held.add_(gradient)

    def _learning(self, name: str) -> list[nn.Parameter]:
        return [p for p in self.trainable.groups()[name].parameters() if p.requires_grad]

    def _take_step(self, names: list[str]) -> None:
        """Average, clip and step every group that has a loss, or none of them."""
        norms = []
        for name in names:
            held = [p for p in self._learning(name) if p.grad is not None]
            _average_gradients(held, self.trainer.world_size)
            norms.append(clip_gradients(held, self.gradient_clip))
        self.gradient_norm = torch.stack(norms).norm()
        finite = torch.isfinite(self.gradient_norm)
        for name, optimizer in zip(self.trainable.groups(), self._optimizers(), strict=True):
            if name in names:
                inner = optimizer.optimizer
                # read by fused optimizers on the device: no host sync to skip a step
                inner.found_inf = (~finite).float()  # type: ignore[attr-defined]
                # only the first one is stepped through Lightning, which counts steps by it
                (optimizer if name == MODEL else inner).step()
                inner.zero_grad()
        for schedule in self._schedules():
            schedule.step()
        with torch.no_grad():
            self.trainable.end_step(self.step, finite)
        self.counts |= self.trainable.counts()
        self.count_step()

    def _optimizers(self) -> list[LightningOptimizer]:
        found = self.optimizers()
        return found if isinstance(found, list) else [found]

    def _schedules(self) -> list[Any]:
        found = self.lr_schedulers()
        return found if isinstance(found, list) else [found]

    def configure_optimizers(self) -> Any:
        """Build one optimizer a group, each with its schedule, in the groups' order."""
        optimizers = [self.optimizer_factory.build(m) for m in self.trainable.groups().values()]
        schedules = [self.lr_schedule.build(o, self.trainer.max_steps) for o in optimizers]
        return optimizers, schedules


def _average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Replace gradients by their mean over all processes, in one exchange."""
    if world_size == 1 or not parameters:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = all_reduce(torch.cat([gradient.flatten() for gradient in gradients])).div_(world_size)
    means = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
