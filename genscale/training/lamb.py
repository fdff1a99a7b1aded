"""LAMB: Adam's update, as long as the tensor it moves; as released with FIT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from genscale.errors import ConfigError
from genscale.training.optim import OptimizerFactory
from genscale.training.parallel import local_part


@dataclass(frozen=True, slots=True, kw_only=True)
class Lamb(OptimizerFactory):
    """LAMB for large batches (arXiv:1904.00962), in the form with which FIT was released.

    With moments m and v that are not corrected for their start, u = m / (sqrt(v) + eps) +
    weight_decay p, and p moves by lr r u, where r = min(norm of p, clamp) / norm of u, each of
    a whole tensor, or 1 where either norm is 0.

    Args:
        lr: peak learning rate: about the relative change of a tensor in a step.
        betas: see :class:`~genscale.training.optim.OptimizerFactory`, as for all that follow.
        clamp: largest norm of a tensor that counts.

    Raises:
        ConfigError: an impossible number.
    """

    lr: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clamp: float = 10.0

    def __post_init__(self) -> None:
        # slots make a class anew, which a super() without arguments does not find
        OptimizerFactory.__post_init__(self)
        if not self.clamp > 0:
            raise ConfigError(
                f"optim.clamp must be positive, but {self.clamp} was given. LAMB has 10."
            )

    def build(self, model: nn.Module) -> Optimizer:
        """Return the optimizer over the trainable parameters of ``model``."""
        return LayerwiseAdam(
            self.groups(model),
            lr=self.lr,
            betas=(float(self.betas[0]), float(self.betas[1])),
            eps=self.eps,
            weight_decay=self.weight_decay,
            clamp=self.clamp,
        )


class LayerwiseAdam(Optimizer):
    """The optimizer of :class:`Lamb`; all tensors of a group move together.

    Tensors that are cut over processes count by their whole norm: one exchange a group and step.
    A step is skipped, without waiting for the device, where an attribute ``found_inf`` is not 0.

    Args:
        parameters: tensors or groups of them.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        clamp: largest norm of a tensor that counts.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clamp: float,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clamp": clamp,
        }
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._move(parameters, group)
        return loss

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state_of(parameter) for parameter in parameters]
        weights = [local_part(parameter) for parameter in parameters]
        gradients = [local_part(cast(Tensor, parameter.grad)) for parameter in parameters]
        gradients = [g.to(w.dtype) for g, w in zip(gradients, weights, strict=True)]
        first = [local_part(state["exp_avg"]) for state in states]
        second = [local_part(state["exp_avg_sq"]) for state in states]
        keep: Tensor | None = None
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            keep = found_inf.to(weights[0].device, non_blocking=True) == 0
            gradients = [torch.where(keep, gradient, 0.0) for gradient in gradients]

        beta1, beta2 = group["betas"]
        torch._foreach_mul_(first, _kept(beta1, 1.0, keep, weights[0]))
        torch._foreach_add_(first, gradients, alpha=1.0 - beta1)
        torch._foreach_mul_(second, _kept(beta2, 1.0, keep, weights[0]))
        torch._foreach_addcmul_(second, gradients, gradients, value=1.0 - beta2)
        roots = torch._foreach_sqrt(second)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(first, roots)
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])

        sizes, lengths = _whole_norms(parameters, weights, updates)
        moving = (sizes > 0) & (lengths > 0)
        ratios = torch.where(moving, sizes.clamp(max=group["clamp"]) / lengths, 1.0)
        shares = -ratios * _kept(group["lr"], 0.0, keep, ratios)
        steps = [s.to(u.dtype) for s, u in zip(shares.unbind(), updates, strict=True)]
        torch._foreach_mul_(updates, steps)
        torch._foreach_add_(weights, updates)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _kept(value: float, otherwise: float, keep: Tensor | None, like: Tensor) -> Tensor:
    """Return ``value``, or ``otherwise`` where a step is skipped, as a scalar on the device."""
    number = torch.full((), value, device=like.device, dtype=like.dtype)
    return number if keep is None else torch.where(keep, number, otherwise)


def _whole_norms(
    parameters: list[Tensor], weights: Sequence[Tensor], updates: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the norms ``(n,)`` of weights and updates, of which each process holds its parts.

    Squares are summed in float64, so that the rounded step does not depend on how tensors are cut.
    """
    norms = torch._foreach_norm([*weights, *updates], 2, dtype=torch.float64)
    squares = torch.stack(list(norms)).square().view(2, -1)
    cut = [isinstance(parameter, DTensor) for parameter in parameters]
    if any(cut):
        mesh = next(p.device_mesh for p in parameters if isinstance(p, DTensor))
        total = squares.clone()
        dist.all_reduce(total, group=mesh.get_group())
        columns = zip(cut, total.unbind(1), squares.unbind(1), strict=True)
        squares = torch.stack([each if here else whole for here, each, whole in columns], dim=1)
    sizes, lengths = squares.sqrt()
    return sizes, lengths
