"""The 2-D selective scan operator of VMamba (arXiv:2401.10166), as LaMamba-Diff uses it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.layers.norm import upcast
from genscale.layers.scan import ScanKind, scan_grid, scan_orders

NUM_DIRECTIONS = 4


def initial_step_bias(*shape: int) -> Tensor:
    """Draw biases whose softplus is log-uniform on [0.001, 0.1] (arXiv:2312.00752, section 3.6)."""
    step = torch.exp(torch.rand(*shape) * math.log(0.1 / 0.001) + math.log(0.001))
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus


class SS2D(nn.Module):
    """Gated selective scan over a grid in four directions, whose outputs are summed.

    Project to x and z; depthwise convolution and SiLU on x; a selective scan of x along each of
    four orders, with step sizes and vectors read off x; sum, layer norm, gate silu(z), project.
    The scan runs in float32. It is linear in the number of cells and takes grids of any sides.

    Args:
        hidden_size: width C of input and output.
        state_size: numbers of state N a channel and direction.
        expansion: inner width E over C.
        step_rank: rank of the step sizes; default ceil(C / 16).
        kernel_size: side of the depthwise kernel, odd.
        conv_bias: whether the depthwise convolution has a bias.
        scan: the orders, see :func:`~genscale.layers.scan.orders.scan_orders`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 1,
        expansion: float = 2.0,
        step_rank: int | None = None,
        kernel_size: int = 3,
        conv_bias: bool = False,
        scan: ScanKind = "continuous",
    ) -> None:
        super().__init__()
        inner = int(expansion * hidden_size)
        rank = math.ceil(hidden_size / 16) if step_rank is None else step_rank
        self.scan, self.step_rank, self.state_size = scan, rank, state_size
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.conv = nn.Conv2d(
            inner, inner, kernel_size, padding=kernel_size // 2, groups=inner, bias=conv_bias
        )
        self.select = nn.Parameter(torch.empty(NUM_DIRECTIONS, rank + 2 * state_size, inner))
        self.step_weight = nn.Parameter(torch.empty(NUM_DIRECTIONS, inner, rank))
        self.step_bias = nn.Parameter(torch.empty(NUM_DIRECTIONS, inner))
        self.log_rate = nn.Parameter(torch.empty(NUM_DIRECTIONS * inner, state_size))
        self.skip = nn.Parameter(torch.empty(NUM_DIRECTIONS * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the scan's own parameters: rates 1..N, small log-uniform steps, a skip of one."""
        bound = self.select.shape[2] ** -0.5
        self.select.uniform_(-bound, bound)
        self.step_weight.uniform_(-(self.step_rank**-0.5), self.step_rank**-0.5)
        self.step_bias.copy_(initial_step_bias(*self.step_bias.shape))
        self.log_rate.copy_(torch.arange(1, self.state_size + 1).log().expand_as(self.log_rate))
        self.skip.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of a grid ``(B, H, W, C)``."""
        height, width = x.shape[1:3]
        x, z = self.in_proj(x).chunk(2, dim=-1)
        # both permutations are views: the convolution reads and writes channels-last memory
        x = F.silu(self.conv(x.permute(0, 3, 1, 2)))
        cells = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, L, E), row by row
        # a projection of every cell is the same before and after cells are put in order
        read = F.linear(cells, self.select.flatten(0, 1)).unflatten(2, (NUM_DIRECTIONS, -1))
        low_rank, B, C = read.split((self.step_rank, self.state_size, self.state_size), dim=-1)
        cells = upcast(cells)  # and so the output, until it is normalised
        merged = scan_grid(
            cells,
            low_rank,
            self.step_weight,
            -upcast(self.log_rate).exp().unflatten(0, (NUM_DIRECTIONS, -1)),
            B,
            C,
            *scan_orders(self.scan, height, width, x.device),
            bias=self.step_bias,
        )
        # every direction skips the scan with a factor of its own, from the same cell
        skip = upcast(self.skip).unflatten(0, (NUM_DIRECTIONS, -1)).sum(0)
        merged = self.out_norm(torch.addcmul(merged, cells, skip))
        merged = merged.unflatten(1, (height, width))
        return self.out_proj(merged.to(z.dtype) * F.silu(z))
