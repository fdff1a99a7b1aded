"""From logits to a token: filters, and draws that are a function of given noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Give all but the likeliest tokens the logit -inf.

    ``top_k`` goes first; tokens as likely as the last one kept are kept, too. ``top_p`` then drops
    the least likely ones as long as their total probability is at most 1 - top_p, but never the
    likeliest (arXiv:1904.09751). Only what ``top_k`` left is sorted.

    Args:
        logits: ``(..., V)``.
        top_k: tokens to keep; 0 keeps all.
        top_p: probability to keep, in (0, 1); 0 and 1 keep all.
    """
    vocab_size = logits.shape[-1]
    narrowed = 0 < top_k < vocab_size
    if not narrowed and not 0.0 < top_p < 1.0:
        return logits
    likeliest = logits.topk(top_k if narrowed else vocab_size, dim=-1).values
    least = likeliest[..., -1:]
    if 0.0 < top_p < 1.0:
        rising = likeliest.flip(-1)
        dropped = rising.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
        dropped[..., -1] = False
        least = rising.gather(-1, dropped.sum(dim=-1, keepdim=True))
    return logits.masked_fill(logits < least, -math.inf)


def draw_tokens(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw one token a place by inverting the distribution function.

    Args:
        logits: ``(B, n, V)``; -inf is never drawn.
        noise: ``(B, n)`` unit normal: the token is where the distribution function of the codes
            passes that of the normal at ``noise``. Close noise gives the same token most of the
            time, so that search may move through noise as it does for diffusion.

    Returns:
        ``(B, n)`` int64.
    """
    uniform = torch.special.ndtr(noise.to(device=logits.device, dtype=torch.float64))
    cumulative = logits.softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1)
    total = cumulative[..., -1]
    # strictly below the total: the token found has a probability above zero
    level = torch.minimum((uniform * total).float(), torch.nextafter(total, total.new_zeros(())))
    return torch.searchsorted(cumulative, level[..., None], right=True)[..., 0]


def smooth_weights(logits: Tensor, gumbel: Tensor, progress: float) -> Tensor:
    """Return weights over the codes ``(B, n, V)`` that mix likely ones, less so at fine scales.

    softmax((logits (1 + r) + gumbel) / tau) with tau = max(0.27 (1 - 0.95 r), 0.005), as VAR's
    program smooths pictures for the eye; scores are computed without.

    Args:
        logits: ``(B, n, V)``; codes of -inf have no part.
        gumbel: of the same shape, standard Gumbel.
        progress: r = k / (S - 1).
    """
    tau = max(0.27 * (1.0 - 0.95 * progress), 0.005)
    return ((logits * (1.0 + progress) + gumbel) / tau).softmax(dim=-1)
