"""Scaling of long skip connections (ScaleLong, arXiv:2310.13545)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import ConfigError, did_you_mean
from genscale.layers.norm import upcast

SkipScaling = Literal["none", "constant", "geometric", "gate_shared", "gate", "channel"]


class TokenGate(nn.Module):
    """One factor in (0, 1) a token: sigmoid(W_2 relu(W_1 m)), m the tokens' means over channels.

    The weights belong to a number of tokens, and so to one resolution.

    Args:
        num_tokens: N.
        reduction: the inner width is N // reduction.
    """

    def __init__(self, num_tokens: int, reduction: int = 16) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.linear_1 = nn.Linear(num_tokens, num_tokens // reduction)
        self.linear_2 = nn.Linear(num_tokens // reduction, num_tokens)

    def reset_parameters(self) -> None:
        """Draw by torch's own law, so that factors start near 1/2."""
        self.linear_1.reset_parameters()
        self.linear_2.reset_parameters()

    def forward(self, skip: Tensor) -> Tensor:
        """Scale ``(B, ..., D)`` with N positions.

        Raises:
            ValueError: another number of positions.
        """
        means = skip.mean(-1)
        flat = means.flatten(1)  # (B, N)
        if flat.shape[1] != self.num_tokens:
            raise ValueError(
                f"The gate of the skips was built for {self.num_tokens} tokens, but there are "
                f"{flat.shape[1]}. Give inputs of the trained size, or build the model with a "
                "skip_scale other than gate and gate_shared."
            )
        gate = torch.sigmoid(self.linear_2(F.relu(self.linear_1(flat))))
        return (skip * gate.view(*means.shape, 1)).to(skip.dtype)


class SkipScale(nn.Module):
    """Factors on the long skips of a U-shaped backbone, applied before they are joined.

    | kind | factor of skip j of n, j = 0 the innermost (deepest) |
    |---|---|
    | ``none`` | 1: the skip itself, bit for bit |
    | ``constant`` | 1 / sqrt 2 |
    | ``geometric`` | kappa^(n - 1 - j): 1 on the outermost; the paper's CS |
    | ``gate_shared`` | a :class:`TokenGate`, one for all skips of as many tokens; the paper's LS |
    | ``gate`` | a :class:`TokenGate` each |
    | ``channel`` | a learned number a channel and skip, 1 at the start; of any resolution |

    Args:
        kind: one of the above.
        num_skips: n.
        hidden_size: width D of the skips, of each or of all; read by ``channel``.
        num_tokens: positions N of a skip, of each or of all; read by the gates.
        kappa: base of ``geometric``, in (0, 1]; with many skips choose it near 1, so that
            kappa^(n - 1) stays about 0.1 or more.
        reduction: see :class:`TokenGate`.

    Raises:
        ConfigError: an unknown kind, a kappa outside (0, 1], or too few tokens for a gate.
    """

    def __init__(
        self,
        kind: SkipScaling,
        num_skips: int,
        *,
        hidden_size: int | Sequence[int],
        num_tokens: int | Sequence[int],
        kappa: float = 0.5,
        reduction: int = 16,
    ) -> None:
        super().__init__()
        known = get_args(SkipScaling)
        if kind not in known:
            raise ConfigError(
                f"model.skip_scale must be one of {', '.join(known)}, but is {kind!r}."
                f"{did_you_mean(str(kind), known)}"
            )
        if not 0 < kappa <= 1:
            raise ConfigError(
                f"model.skip_kappa must lie in (0, 1], but is {kappa}. "
                "The published range is 0.5 to 0.95."
            )
        self.kind = kind
        self.factors: list[float] | None = None
        self.gates: nn.ModuleList | None = None
        self.channels: nn.Parameter | nn.ParameterList | None = None
        self.gate_of: list[int] = []  # which gate is a skip's
        if kind == "constant":
            self.factors = [math.sqrt(0.5)] * num_skips
        elif kind == "geometric":
            self.factors = [kappa ** (num_skips - 1 - j) for j in range(num_skips)]
        elif kind in ("gate", "gate_shared") and num_skips:
            tokens = _each(num_tokens, num_skips)
            if min(tokens) < reduction:
                raise ConfigError(
                    f"model.skip_scale={kind} needs {reduction} tokens at least, but a skip of the "
                    f"trained input has {min(tokens)}. Choose another, or smaller patches."
                )
            sizes = list(dict.fromkeys(tokens)) if kind == "gate_shared" else tokens
            self.gates = nn.ModuleList(TokenGate(size, reduction) for size in sizes)
            self.gate_of = [j if kind == "gate" else sizes.index(n) for j, n in enumerate(tokens)]
        elif kind == "channel" and isinstance(hidden_size, int):
            self.channels = nn.Parameter(torch.empty(num_skips, hidden_size))
        elif kind == "channel":
            widths = _each(hidden_size, num_skips)
            self.channels = nn.ParameterList(nn.Parameter(torch.empty(size)) for size in widths)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start gates by torch's own law and channel factors at 1."""
        for gate in self.gates.children() if self.gates is not None else ():
            if isinstance(gate, TokenGate):
                gate.reset_parameters()
        if isinstance(self.channels, nn.Parameter):
            nn.init.ones_(self.channels)
        for factors in self.channels if isinstance(self.channels, nn.ParameterList) else ():
            nn.init.ones_(factors)

    def forward(self, skip: Tensor, index: int) -> Tensor:
        """Scale skip ``index`` (0 is the innermost) of shape ``(B, ..., D)``."""
        if self.factors is not None:
            return skip * self.factors[index]
        if self.gates is not None:
            gated: Tensor = self.gates[self.gate_of[index]](skip)
            return gated
        if self.channels is not None:
            return (skip * upcast(self.channels[index])).to(skip.dtype)
        return skip


def _each(value: int | Sequence[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)
