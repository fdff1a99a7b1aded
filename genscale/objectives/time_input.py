"""What number a network is fed for a level: the objective's ``time_input``."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

TimeInput = Literal[
    "dimr_linear",
    "unit",
    "one_minus",
    "index",
    "timestep",
    "vp_index",
    "log_snr",
    "quarter_log_sigma",
]

# DiMR's continuous recipe clamps the log SNR so; it keeps clean data and pure noise finite
_LOG_SNR_RANGE = (math.log(1e-12), math.log(1e6))


def time_input_of(kind: TimeInput, time: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the network's time, elementwise.

    | kind | number | networks |
    |---|---|---|
    | ``dimr_linear`` | 8 t - 4 | DiMR |
    | ``unit`` | t: 0 data, 1 noise | flow models |
    | ``one_minus`` | 1 - t | SiT's official weights |
    | ``index`` | 1000 t: the noise step n of DDPM | U-ViT |
    | ``timestep`` | 1000 t - 1: the noise step counted from 0 | DiT |
    | ``vp_index`` | 999 t | U-ViT in continuous time |
    | ``log_snr`` | log(alpha^2 / sigma^2), in [log 1e-12, log 1e6] | continuous VP recipes |
    | ``quarter_log_sigma`` | log(sigma / alpha) / 4, in the same range | EDM |

    Args:
        kind: one of the above.
        time: process time t in [0, 1], float64.
        alpha: signal coefficient at t.
        sigma: noise coefficient at t, over the input scale where there is one (EDM's sigma_in).

    Returns:
        float32, shaped as ``time``.
    """
    if kind == "dimr_linear":
        number = 8.0 * time - 4.0
    elif kind == "unit":
        number = time
    elif kind == "one_minus":
        number = 1.0 - time
    elif kind == "index":
        number = 1000.0 * time
    elif kind == "timestep":
        number = 1000.0 * time - 1.0
    elif kind == "vp_index":
        number = 999.0 * time
    else:
        log_snr = 2.0 * (torch.log(alpha) - torch.log(sigma))
        log_snr = log_snr.clamp(*_LOG_SNR_RANGE)
        number = log_snr if kind == "log_snr" else log_snr / -8.0
    return number.float()
