"""Time-dependent parameters of a whole model, packed (arXiv:2406.09416)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn


class TimeDependentVectors(nn.Module):
    """Every time-dependent vector of a model, computed by one sigmoid and one lerp.

    A vector p blends two learned ones, p(tau) = value_1 + s (value_0 - value_1), by a learned
    gate s = sigmoid(tau (1 + gate_weight) + gate_bias), everything elementwise. At the start
    both values are equal and the gate is neutral, so the model ignores time.

    The vectors live end to end in four flat parameters. They are one-dimensional so that
    optimizers which treat matrices in a special way see them as the vectors they are, and four
    so that weight decay can spare the gates alone: decay would pull a gate to its start.

    Args:
        layout: length and initial value of every vector, by name. The order is part of the
            checkpoint's meaning.
    """

    GATES = ("gate_weight", "gate_bias")

    def __init__(self, layout: Mapping[str, tuple[int, float]]) -> None:
        super().__init__()
        self.names = tuple(layout)
        self.sizes = tuple(size for size, _ in layout.values())
        self._inits = tuple(init for _, init in layout.values())
        total = sum(self.sizes)
        self.value_0 = nn.Parameter(torch.empty(total))
        self.value_1 = nn.Parameter(torch.empty(total))
        self.gate_weight = nn.Parameter(torch.empty(total))
        self.gate_bias = nn.Parameter(torch.empty(total))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the values to each vector's initial value and the gates to zero."""
        for values in (self.value_0, self.value_1):
            for part, init in zip(values.split(self.sizes), self._inits, strict=True):
                part.fill_(init)
        self.gate_weight.zero_()
        self.gate_bias.zero_()

    def slices(self) -> dict[str, slice]:
        """Return where each vector lies in the flat parameters, by name."""
        ends = accumulate(self.sizes)
        return {
            name: slice(end - size, end)
            for name, size, end in zip(self.names, self.sizes, ends, strict=True)
        }

    def forward(self, tau: Tensor) -> tuple[Tensor, ...]:
        """Evaluate all vectors.

        Args:
            tau: ``(B,)`` times, or ``(1,)`` for one time shared by the batch.

        Returns:
            Views ``(B, D_i)`` (or ``(1, D_i)``) in the order of the layout, at least float32.
        """
        dtype = torch.promote_types(self.value_0.dtype, torch.float32)
        value_0, value_1 = self.value_0.to(dtype), self.value_1.to(dtype)
        tau = tau.to(dtype)[:, None]
        gate = torch.sigmoid(torch.addcmul(self.gate_bias.to(dtype), tau, 1 + self.gate_weight))
        return torch.lerp(value_1, value_0, gate).split(self.sizes, dim=-1)
