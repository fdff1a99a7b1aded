"""Which implementation runs a selective scan, and why another does not.

| name | what it is | where |
|---|---|---|
| ``chunked`` | torch operations; states are computed again in the backward pass | anywhere |
| ``reference`` | one step after the other with plain autograd | anywhere |
| ``triton`` | fused kernel, :mod:`genscale.layers.scan.fused` | CUDA |
| ``mamba_ssm`` | the official CUDA operator, through its public function | CUDA |

``auto`` takes the first of mamba_ssm, triton and chunked that can run; on a CPU that is chunked.
The environment variable GENSCALE_SCAN names what ``auto`` means.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean

Implementation = Literal["auto", "chunked", "reference", "triton", "mamba_ssm"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
VARIABLE = "GENSCALE_SCAN"

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)


def choose_implementation(
    wanted: str, obstacles: dict[str, str | None], order: Sequence[str], *, device: str
) -> str:
    """Return the implementation that runs.

    Args:
        wanted: what the caller asks for; ``"auto"`` takes what GENSCALE_SCAN names, if set, or
            the first of ``order`` that can run.
        obstacles: for each name, why it cannot run here, or None; missing names can.
        order: what ``"auto"`` tries; the last one must be able to run.
        device: type of the device, for the log.

    Raises:
        ConfigError: an unknown name, or one that cannot run, with the reason.
    """
    source = "implementation"
    # tensors without memory only count operations and sizes: any implementation will do
    if wanted == "auto" and device != "meta" and (variable := _environment_choice()):
        wanted, source = variable, VARIABLE
    if wanted not in IMPLEMENTATIONS:
        raise ConfigError(
            f"{source} must be one of {', '.join(IMPLEMENTATIONS)}, but is {wanted!r}."
            f"{did_you_mean(wanted, IMPLEMENTATIONS)} Leave it at 'auto'."
        )
    if wanted != "auto":
        if reason := obstacles.get(wanted):
            raise ConfigError(
                f"{source}={wanted} cannot run this scan: {reason}. Leave it at 'auto'."
            )
        return wanted
    chosen = next(name for name in order if not obstacles.get(name))
    _log_once(chosen, device)
    return chosen


def _constant_when_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Let torch.compile take what a function returns as a constant instead of looking inside.

    This is ``torch.compiler.assume_constant_result``, which would import the compiler at once.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_compiled
def _environment_choice() -> str:
    return os.environ.get(VARIABLE, "").strip()


@_constant_when_compiled
def _log_once(chosen: str, device: str) -> None:
    _log(chosen, device)


@lru_cache
def _log(chosen: str, device: str) -> None:
    # where there is but one way it is no news
    level = logging.DEBUG if (chosen, device) == ("chunked", "cpu") else logging.INFO
    logger.log(level, "selective scans on %s run as %r (%s overrides)", device, chosen, VARIABLE)


@_constant_when_compiled
def triton_obstacle(device: str, double: bool) -> str | None:
    """Return why the Triton kernel cannot run on a device of this type, or None."""
    if double:
        return "the kernel computes in float32 and an input is float64"
    if not _is_installed("triton"):
        return "the package 'triton' is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device != "cuda" and not (device == "cpu" and interpreted):
        return f"it needs a CUDA device and the tensors are on {device}"
    return None


@_constant_when_compiled
def mamba_obstacle(device: str, double: bool, num_states: int, initial: bool) -> str | None:
    """Return why the official operator cannot run with these arguments, or None."""
    if device != "cuda":
        return f"it needs a CUDA device and the tensors are on {device}"
    if double:
        return "the operator computes in float32 and an input is float64"
    if initial:
        return "the operator takes no initial state"
    if num_states > 256:
        return f"the operator takes at most 256 numbers of state a channel and A has {num_states}"
    return _official_obstacle()


@lru_cache
def _official_obstacle() -> str | None:
    """Return what keeps the official operator from being called; its package may come without."""
    if not _is_installed("mamba_ssm"):
        return "the package 'mamba-ssm' is not installed"
    try:
        from mamba_ssm.ops import selective_scan_interface
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, as a rule
        return f"the package 'mamba-ssm' cannot be imported ({error})"
    if getattr(selective_scan_interface, "selective_scan_cuda", None) is None:
        return (
            "the package 'mamba-ssm' was installed without its CUDA operator "
            "(MAMBA_KEEP_CUDA_BUILD=TRUE at installation keeps it)"
        )
    return None


@lru_cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class _RefuseGradient(torch.autograd.Function):
    """The value as it is; asking for its gradient is an error instead of silently zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "The official selective scan does not differentiate the last state, but its gradient "
            "is needed. Pass implementation='triton' or 'chunked'."
        )


def official_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Call mamba_ssm's ``selective_scan_fn``; layouts as in ``selective_scan``.

    The gradient of the last state, which it ignores, is refused.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y, last = selective_scan_fn(
        u.contiguous(),
        delta.to(u.dtype).contiguous(),
        A.float().contiguous(),
        _constant_or_contiguous(B, u.dtype),
        _constant_or_contiguous(C, u.dtype),
        D=None if D is None else D.float().contiguous(),
        z=None if z is None else z.to(u.dtype).contiguous(),
        delta_bias=None if delta_bias is None else delta_bias.float().contiguous(),
        delta_softplus=delta_softplus,
        return_last_state=True,
    )
    return y, _RefuseGradient.apply(last.detach(), u)


def _constant_or_contiguous(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors over time in the input's type, constant ones in float32, as the operator wants."""
    return (value.float() if value.dim() == 2 else value.to(dtype)).contiguous()
