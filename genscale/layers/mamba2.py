"""The Mamba-2 block (arXiv:2405.21060), with a state that lets sequences arrive in pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.layers.norm import upcast
from genscale.layers.scan import ssd
from genscale.layers.ss2d import initial_step_bias


@dataclass(frozen=True, slots=True)
class Mamba2State:
    """What a block remembers of the tokens so far.

    Shapes:
        tail: ``(B, kernel_size - 1, E + 2 G N)`` the convolution's last inputs.
        scan: ``(B, H, P, N)`` state of the scan, float32.
    """

    tail: Tensor
    scan: Tensor

    def select(self, index: Tensor) -> Mamba2State:
        """Take the rows ``index`` (int64, repeats allowed)."""
        return Mamba2State(self.tail[index], self.scan[index])


class Mamba2(nn.Module):
    """Project, causal depthwise convolution, scan, gated RMS norm, project; on ``(B, L, D)``.

    The input projection gives, in this order: gate z (E), scan input x (E), B (G N), C (G N) and
    one raw step size a head (H); the convolution runs over x, B and C.

    Args:
        hidden_size: width D of input and output.
        state_size: numbers of state N a channel.
        expansion: inner width E over D.
        head_size: channels P of a head; E must be a multiple of it.
        num_groups: groups G of heads that share B and C.
        kernel_size: taps of the convolution.
        eps: added to the mean square in the norm.

    Raises:
        ValueError: sizes do not divide each other.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 64,
        expansion: int = 2,
        head_size: int = 64,
        num_groups: int = 1,
        kernel_size: int = 4,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        inner = expansion * hidden_size
        if inner % head_size or (inner // head_size) % num_groups:
            raise ValueError(
                f"The inner width {inner} must be a multiple of head_size {head_size}, and its "
                f"{inner // head_size} heads one of num_groups {num_groups}. Change head_size or "
                "num_groups."
            )
        heads, mixed = inner // head_size, inner + 2 * num_groups * state_size
        self.inner_size, self.mixed_size, self.num_heads = inner, mixed, heads
        self.state_size, self.num_groups, self.eps = state_size, num_groups, eps
        self.kernel_size = kernel_size
        self.in_proj = nn.Linear(hidden_size, inner + mixed + heads, bias=False)
        self.conv = nn.Conv1d(mixed, mixed, kernel_size, groups=mixed)
        self.step_bias = nn.Parameter(torch.empty(heads))
        self.log_rate = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.empty(heads))
        self.norm_scale = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the scan's own parameters: rates uniform on [1, 16], small log-uniform steps."""
        self.step_bias.copy_(initial_step_bias(self.num_heads))
        self.log_rate.uniform_(1, 16).log_()
        self.skip.fill_(1.0)
        self.norm_scale.fill_(1.0)

    def forward(self, x: Tensor, state: Mamba2State | None = None) -> tuple[Tensor, Mamba2State]:
        """Mix tokens causally.

        Args:
            x: ``(B, L, D)``.
            state: what the call on the tokens before these returned; None at the beginning.

        Returns:
            ``(B, L, D)``, and the state after the last token.
        """
        batch, length, _ = x.shape
        z, mixed, step = self.in_proj(x).split(
            (self.inner_size, self.mixed_size, self.num_heads), dim=-1
        )
        if state is None:
            tail = mixed.new_zeros(batch, self.kernel_size - 1, self.mixed_size)
        else:
            tail = state.tail.to(mixed.dtype)
        mixed = torch.cat((tail, mixed), dim=1)
        tail = mixed[:, length:]
        mixed = F.silu(self.conv(mixed.transpose(1, 2))).transpose(1, 2)
        shared = self.num_groups * self.state_size
        u, B, C = mixed.split((self.inner_size, shared, shared), dim=-1)
        y, scan = ssd(
            u.unflatten(2, (self.num_heads, -1)),
            step,
            -upcast(self.log_rate).exp(),
            B.unflatten(2, (self.num_groups, -1)),
            C.unflatten(2, (self.num_groups, -1)),
            D=self.skip,
            dt_bias=self.step_bias,
            initial_state=None if state is None else state.scan,
        )
        return self.out_proj(self._norm(y.flatten(2), z)), Mamba2State(tail, scan)

    def _norm(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate, then divide by the root mean square over each group's channels, in float32."""
        gated = (upcast(y) * F.silu(upcast(z))).unflatten(2, (self.num_groups, -1))
        gated = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return (gated.flatten(2) * upcast(self.norm_scale)).to(z.dtype)
