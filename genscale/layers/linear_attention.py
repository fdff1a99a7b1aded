"""Attention of linear cost in the number of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.layers.norm import no_autocast, upcast
from genscale.layers.rope import rotate

_TINY = 1e-30  # below it a coordinate counts as zero; its power is zero in float32


class NormAwareLinearAttention(nn.Module):
    """NaLa: linear attention that keeps the norm of the query (arXiv:2506.21137).

    The norm of a query tells softmax attention how peaked to be; a plain feature map forgets it.
    Here it sets the power to which the direction of the query is raised,

        q^+- = relu(+-q / |q|)^p,   p = 3 (1/2 + tanh |q|),      k^+- = relu(+-k^3),

    and only parts of one sign meet, so that all weights before rotation are non-negative and
    still know the sign. With Q = [q^+, q^-], K = [k^+, k^-], and Q~, K~ the same with every part
    turned by the rotary embedding R,

        o_i = sum_j (Q~_i . K~_j) v_j / sum_j (Q_i . K_j),
        y = W_o (silu(g) * LN(o + depthwise_5x5(v))).

    The normaliser uses the unrotated features, which keep it positive. Everything between the
    two projections runs in float32: the cube overflows float16, and powers lose most of bfloat16.

    Args:
        hidden_size: width D.
        num_heads: heads h; D / h must be a multiple of 4.
        eps: added to the normaliser.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.qkvg = nn.Linear(hidden_size, 4 * hidden_size)
        self.local = nn.Conv2d(hidden_size, hidden_size, 5, padding=2, groups=hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, grid: tuple[int, int], rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Attend over all cells of a grid.

        Args:
            x: ``(B, N, D)``, the cells row by row.
            grid: height and width, N = height * width.
            rotation: cosines and sines ``(1, N, d / 2)`` of :func:`axial_rotation`.
        """
        q, k, v, g = self.qkvg(x).chunk(4, dim=-1)
        with no_autocast(x.device):
            v = upcast(v)
            y = self._attend(upcast(q), upcast(k), v, rotation)
            y = y + self._mix_neighbours(v, grid)
            y = F.layer_norm(
                y, y.shape[-1:], upcast(self.norm.weight), upcast(self.norm.bias), self.norm.eps
            )
            y = y * F.silu(upcast(g))
        return self.out(y.to(x.dtype))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Return o ``(B, N, D)``; all inputs are ``(B, N, D)``."""
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v)
        )  # (B, h, N, d)
        q = _query_features(q)
        k = k**3
        parts_q, parts_k = (_by_sign(q), _by_sign(k))
        cosine, sine = rotation
        turned_q, turned_k = (
            torch.cat([rotate(part, cosine, sine) for part in parts], dim=-1)
            for parts in (parts_q, parts_k)
        )  # (B, h, N, 2 d)
        mean_k = torch.cat(parts_k, dim=-1).mean(2, keepdim=True)
        normaliser = (torch.cat(parts_q, dim=-1) * mean_k).sum(-1, keepdim=True) + self.eps
        # 1 / N in two factors keeps both sides of the product in range
        root = q.shape[2] ** -0.5
        summary = (turned_k * root).transpose(-1, -2) @ (v * root)  # (B, h, 2 d, d)
        y = (turned_q @ summary) / normaliser
        return y.transpose(1, 2).flatten(2)

    def _mix_neighbours(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the depthwise convolution of the values ``(B, N, D)``."""
        picture = v.transpose(1, 2).unflatten(-1, grid)
        weight, bias = self.local.weight, self.local.bias
        mixed = F.conv2d(
            picture,
            upcast(weight),
            None if bias is None else upcast(bias),
            padding=2,
            groups=len(weight),
        )
        return mixed.flatten(2).transpose(1, 2)


def _query_features(q: Tensor) -> Tensor:
    """Return sign(q) (|q| / |q|_2)^p of queries ``(..., d)``, p a function of the norm."""
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp_min(1e-6)
    power = 3.0 * (0.5 + torch.tanh(norm))  # in [1.5, 4.5)
    # by the logarithm, which is finite for the clamped zeros: so are both gradients
    size = torch.exp(power * torch.log((q.abs() / norm).clamp_min(_TINY)))
    return torch.sign(q) * size


def _by_sign(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positive part and the negative part, both non-negative."""
    return F.relu(x), F.relu(-x)


def axial_rotation(rows: Tensor, columns: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines that turn the heads of every cell of a grid.

    The first half of the channel pairs is turned by the row, the second by the column, each by
    place times 10000^(-l), l spread evenly over [0, 1] with both ends.

    Args:
        rows: ``(H,)`` places of the rows.
        columns: ``(W,)`` places of the columns.
        head_size: channels d of a head, a multiple of 4.

    Returns:
        Two tensors ``(1, H * W, d / 2)`` float32, for :func:`~genscale.layers.rope.rotate`.
    """
    quarter = head_size // 4
    exponents = torch.linspace(0, 1, quarter, dtype=rows.dtype, device=rows.device)
    frequencies = 10000.0**-exponents
    shape = (len(rows), len(columns), quarter)
    angles = torch.cat(
        (
            (rows[:, None] * frequencies)[:, None].expand(shape),
            (columns[:, None] * frequencies)[None].expand(shape),
        ),
        dim=-1,
    ).flatten(0, 1)[None]
    return angles.cos().float(), angles.sin().float()
