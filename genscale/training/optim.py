"""Optimizer factories: settings in, a torch optimizer over a model's parameters out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from genscale.backbones.base import Backbone
from genscale.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerFactory(ABC):
    """Settings of an optimizer with two moments and decoupled weight decay.

    Parameters that the model names in ``no_weight_decay()`` get no decay; all others do,
    biases and norms included, as in U-ViT's and DiMR's recipes.

    An optimizer built by it skips a step, on the device, where its attribute ``found_inf`` is not
    0: neither weights nor moments change.

    Args:
        lr: peak learning rate.
        betas: decay rates of the first and second moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay a step, multiplied by the learning rate.
        final_weight_decay: that of the last step, where it differs: in between it follows half a
            cosine, as in VAR's recipe. None keeps it constant.
        decay_all: decay also what the model names, as LaMamba's official program does.

    Raises:
        ConfigError: an impossible number.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    final_weight_decay: float | None = None
    decay_all: bool = False

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(
                f"optim.lr must be positive, but {self.lr} was given. Give e.g. optim.lr=1e-4."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"optim.betas must be two numbers in [0, 1), but {list(self.betas)} was given. "
                "Give e.g. optim.betas=[0.9,0.99]."
            )

    @abstractmethod
    def build(self, model: nn.Module) -> Optimizer:
        """Return the optimizer over the trainable parameters of ``model``."""

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the trainable parameters of ``model`` by what decays them."""
        exempt: set[str] = set()
        if isinstance(model, Backbone) and not self.decay_all:
            exempt = model.no_weight_decay()
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (plain if name in exempt else decayed).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        if self.final_weight_decay is not None:  # the schedule reads it
            groups[0]["weight_decay_range"] = (self.weight_decay, self.final_weight_decay)
        return [group for group in groups if group["params"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(OptimizerFactory):
    """AdamW with decoupled weight decay (arXiv:1711.05101), fused into one kernel a step."""

    def build(self, model: nn.Module) -> Optimizer:
        """Return the optimizer over the trainable parameters of ``model``."""
        # fused also lets a non-finite step be skipped on the device, without a host sync
        return torch.optim.AdamW(
            self.groups(model),
            lr=self.lr,
            betas=(float(self.betas[0]), float(self.betas[1])),  # torch refuses whole numbers
            eps=self.eps,
            fused=True,
        )
