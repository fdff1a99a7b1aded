"""Laws of the training time: keyed uniform numbers in, times in [0, 1] out."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean

TimeLaw = Literal["uniform", "logit_normal"]


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return 1 / (1 + exp(-z)) with z normal: the middle is trained most (arXiv:2403.03206).

    Args:
        u: ``(B,)`` float64 in [0, 1).
        mean: of the logit; above 0 prefers noisy times.
        std: of the logit.
    """
    # keyed uniforms are multiples of 2^-53 and may be 0, whose logit is infinite
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(2.0**-54, 1.0 - 2.0**-53)))


def shifted(time: Tensor, shift: float) -> Tensor:
    """Move times towards noise: s t / (1 + (s - 1) t) (arXiv:2403.03206, eq. 23).

    Keeps 0 and 1; s = 1 changes nothing. Larger pictures need s > 1, as averaging over more
    pixels makes the same sigma less noisy.
    """
    return shift * time / (1.0 + (shift - 1.0) * time)


def check_law(law: str, std: float, shift: float, *, path: str) -> None:
    """Refuse settings that are no law.

    Raises:
        ConfigError: naming the key below ``path``.
    """
    known = get_args(TimeLaw)
    if law not in known:
        raise ConfigError(
            f"{path}.time_law must be one of {', '.join(known)}, but is {law!r}."
            f"{did_you_mean(str(law), known)}"
        )
    for name, value in (("time_std", std), ("time_shift", shift)):
        if not value > 0:
            raise ConfigError(f"{path}.{name} must be positive, but is {value}. 1 is usual.")
