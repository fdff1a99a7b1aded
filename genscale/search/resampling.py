"""Resampling: weights of a population -> which particles live on, and how often.

Every scheme takes M ancestors of N weighted particles such that particle n is expected M W_n times.
They differ in how much the counts vary beyond that: ``systematic`` and ``ssp`` give every particle
floor(M W_n) or ceil(M W_n) descendants, ``multinomial`` draws independently. All numbers are
float64, all populations are resampled at once, and the uniforms are the caller's: keyed ones make
the same choice in any process.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.search.names import check_name

Scheme = Literal["ssp", "systematic", "stratified", "residual", "multinomial"]


def normalise(log_weights: Tensor) -> Tensor:
    """Return the weights ``(..., N)`` of each population, which sum to 1.

    A population of no weight at all, every entry -inf, weighs its particles alike.

    Args:
        log_weights: ``(..., N)`` float64, up to a constant a population; -inf is no weight.
    """
    top = log_weights.amax(-1, keepdim=True)
    safe = torch.where(top > -torch.inf, log_weights - top, 0.0)
    weights = torch.exp(safe)
    return weights / weights.sum(-1, keepdim=True)


def log_normalise(log_weights: Tensor) -> Tensor:
    """Return log-weights ``(..., N)`` whose exponentials sum to 1."""
    return torch.log(normalise(log_weights))


def effective_size(log_weights: Tensor) -> Tensor:
    """Return the effective sample size (sum w)^2 / sum w^2 of each population, in [1, N]."""
    return 1.0 / normalise(log_weights).square().sum(-1)


def check_scheme(scheme: str, setting: str = "search.resampling") -> None:
    """Refuse a scheme that there is not.

    Raises:
        ConfigError: an unknown name.
    """
    check_name(setting, scheme, get_args(Scheme))


def uniforms_needed(scheme: Scheme, particles: int, draws: int) -> int:
    """Return how many uniforms a population's resampling takes."""
    counts = {
        "systematic": 1,
        "stratified": draws,
        "multinomial": draws + 1,
        "residual": draws + 1,
        "ssp": max(particles - 1, 1),
    }
    return counts[scheme]


def resample(
    weights: Tensor, uniforms: Tensor, scheme: Scheme = "ssp", draws: int | None = None
) -> Tensor:
    """Return the ancestors of each population.

    Args:
        weights: ``(G, N)`` float64, each row sums to 1.
        uniforms: ``(G, K)`` float64 in [0, 1), K at least :func:`uniforms_needed`.
        scheme: ``systematic`` (one uniform shifts a comb of M points), ``stratified`` (one in each
            of M equal parts), ``multinomial`` (M ordered independent points), ``residual``
            (floor(M W_n) copies first, the rest drawn multinomially from what is left over) or
            ``ssp`` (Srinivasan sampling: particles exchange their fractions in pairs until all
            counts are whole; arXiv:1707.01845).
        draws: M; None keeps N.

    Returns:
        ``(G, M)`` int64 places in each population; in order, but for ``residual``.

    Raises:
        ConfigError: an unknown scheme.
        ValueError: too few uniforms.
    """
    check_scheme(scheme)
    particles = weights.shape[1]
    count = particles if draws is None else draws
    needed = uniforms_needed(scheme, particles, count)
    if uniforms.shape[1] < needed:
        raise ValueError(
            f"Scheme {scheme} takes {needed} uniforms a population, but {uniforms.shape[1]} were "
            "given. Draw uniforms_needed(...) of them."
        )
    if scheme == "ssp":
        return _repeat(_ssp_counts(weights, uniforms, count), count)
    if scheme == "residual":
        return _residual(weights, uniforms, count)
    if scheme == "multinomial":
        return draw_from(weights, _ordered(uniforms[:, : count + 1]))
    comb = torch.arange(count, dtype=torch.float64, device=weights.device)
    shifts = uniforms[:, :1] if scheme == "systematic" else uniforms[:, :count]
    return draw_from(weights, (shifts + comb) / count)


def draw_from(weights: Tensor, points: Tensor) -> Tensor:
    """Return for each point the smallest n with W_0 + ... + W_n >= point.

    Args:
        weights: ``(G, N)`` float64, each row sums to 1.
        points: ``(G, M)`` in [0, 1].

    Returns:
        ``(G, M)`` int64.
    """
    total = weights.cumsum(-1)
    places = torch.searchsorted(total, points.contiguous())
    # the sum may round to less than 1; particles of no weight behind the last are no choice
    last = torch.searchsorted(total, total[:, -1:].contiguous())
    return torch.minimum(places, last)


def _ordered(uniforms: Tensor, count: Tensor | None = None) -> Tensor:
    """Turn K + 1 uniforms into K sorted ones: partial sums of exponentials over their total.

    Args:
        uniforms: ``(G, K + 1)``.
        count: ``(G, 1)`` how many points each row takes; those behind are of no use.
    """
    sums = torch.cumsum(-torch.log(uniforms.clamp_min(2.0**-54)), -1)
    total = sums[:, -1:] if count is None else sums.gather(-1, count)
    return sums[:, :-1] / total


def _residual(weights: Tensor, uniforms: Tensor, draws: int) -> Tensor:
    expected = draws * weights
    copies = expected.floor()
    rest = draws - copies.sum(-1, keepdim=True).long()  # (G, 1) left to draw
    drawn = draw_from(
        (expected - copies) / rest.clamp(min=1),
        _ordered(uniforms[:, : draws + 1], rest),
    )
    places = torch.arange(draws, device=weights.device).expand(len(weights), -1)
    kept = _repeat(copies.long(), draws)
    behind = places - (draws - rest)
    return torch.where(behind < 0, kept, drawn.gather(-1, behind.clamp(min=0)))


def _repeat(counts: Tensor, draws: int) -> Tensor:
    """Return ``(G, M)`` places, each as often as counted; of fewer than M, the last fills up."""
    places = torch.arange(draws, device=counts.device).expand(len(counts), -1).contiguous()
    found = torch.searchsorted(counts.cumsum(-1), places, right=True)
    return found.clamp(max=counts.shape[1] - 1)


def _ssp_counts(weights: Tensor, uniforms: Tensor, draws: int) -> Tensor:
    """Return how many descendants each particle has ``(G, N)``, by pairwise exchange.

    Two particles with fractions a and b meet. Either the first takes from the second or the other
    way round, as much as makes one of them whole, with probabilities that leave both expectations
    as they are. The one that is still a fraction meets the next.
    """
    expected = draws * weights
    counts = expected.floor()
    fraction = expected - counts
    counts = counts.long()
    rows = torch.arange(len(weights), device=weights.device)
    first = torch.zeros_like(rows)
    second = torch.ones_like(rows)
    last = first
    for turn in range(weights.shape[1] - 1):
        a, b = fraction[rows, first], fraction[rows, second]
        up, down = torch.minimum(b, 1.0 - a), torch.minimum(a, 1.0 - b)
        total = up + down
        chance = torch.where(total > 0, up / total, 0.0)  # that the second gains
        swap = uniforms[:, turn] < chance
        gains = torch.where(swap, second, first)
        loses = torch.where(swap, first, second)
        amount = torch.where(swap, down, up)
        high, low = fraction[rows, gains], fraction[rows, loses]
        emptied = low < 1.0 - high  # the loser has less than the gainer lacks
        fraction[rows, gains] = torch.where(emptied, high + amount, high)
        fraction[rows, loses] = torch.where(emptied, low, low - amount)
        counts[rows, gains] += (~emptied).long()
        following = min(turn + 2, weights.shape[1] - 1)
        first = torch.where(emptied, gains, following)
        second = torch.where(emptied, following, loses)
        last = torch.where(emptied, gains, loses)
    # rounding may leave the last fraction at almost 1 rather than make it whole
    missing = draws - counts.sum(-1)
    counts[rows, last] += missing
    return counts
