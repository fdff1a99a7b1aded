"""Feed-forward layers."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Feed-forward layer W_2 gelu(W_1 x) (arXiv:1606.08415).

    Args:
        hidden_size: width D of input and output.
        mlp_size: width between the layers.
        gelu: ``"none"`` for the exact function, ``"tanh"`` for its approximation.
    """

    def __init__(
        self, hidden_size: int, mlp_size: int, *, gelu: Literal["none", "tanh"] = "none"
    ) -> None:
        super().__init__()
        self.gelu = gelu
        self.up = nn.Linear(hidden_size, mlp_size)
        self.down = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., D)`` to ``(..., D)``."""
        return self.down(F.gelu(self.up(x), approximate=self.gelu))


class GEGLU(nn.Module):
    """Gated feed-forward layer W_2 (gelu(W_0 x) * W_1 x), exact GELU (arXiv:2002.05202).

    W_0 and W_1 are stacked in one matrix, so that the input is read once.

    Args:
        hidden_size: width D of input and output.
        mlp_size: width of the gated product.
    """

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * mlp_size)
        self.down = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., D)`` to ``(..., D)``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * up)


class SwiGLU(nn.Module):
    """Gated feed-forward layer W_2 (silu(W_0 x) * W_1 x) without biases (arXiv:2002.05202).

    W_0 and W_1 are stacked in one matrix, so that the input is read once.

    Args:
        hidden_size: width D of input and output.
        mlp_size: width of the gated product.
    """

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * mlp_size, bias=False)
        self.down = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., D)`` to ``(..., D)``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
