"""HCD: small pictures optimised so that a frozen upscaler rebuilds more from them.

"Downscaled Representation Matters: Improving Image Rescaling with Collaborative Downscaled
Images", arXiv:2211.10643. Two projected gradient searches, one around the picture before it is
made small, one around the small picture. Nothing here knows the networks: any pair of functions
will do, an autoencoder's ``encode`` and ``decode`` included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.rng import Purpose, key, normal, uniform
from genscale.upscaling.rescaling_losses import quantise as to_8_bits

Norm = Literal["l2", "linf"]
Target = Literal["adjusted", "original"]
Map = Callable[[Tensor], Tensor]

_RADIUS = {"l2": 0.3, "linf": 4.0 / 255.0}
_STEP = {"l2": 20.0 / 255.0, "linf": 1.0 / 255.0}


@dataclass(frozen=True, slots=True)
class Collaborative:
    """Small pictures that were searched for.

    Args:
        small: ``(B, c, h, w)``, on the 8-bit grid where quantising was asked for.
        before: ``(B,)`` mean squared error of what is rebuilt from the plain small picture,
            quantised likewise.
        after: that of what is rebuilt from ``small``; never more than ``before``.
        evaluations: how often ``up`` was called.
    """

    small: Tensor
    before: Tensor
    after: Tensor
    evaluations: int


def collaborative_downscale(
    down: Map,
    up: Map,
    x: Tensor,
    *,
    steps_hr: int = 15,
    steps_lr: int = 15,
    eps: float | None = None,
    alpha: float | None = None,
    norm: Norm = "l2",
    quantise: bool = True,
    straight_through: bool = True,
    lr_target: Target = "adjusted",
    value_range: tuple[float, float] | None = (0.0, 1.0),
    restarts: int = 1,
    seeds: Tensor | None = None,
) -> Collaborative:
    """Search for small pictures from which ``up`` rebuilds ``x`` better.

    The first search looks for x + d whose small picture is rebuilt closest to x; the second
    starts from that small picture and changes it itself. The best iterate of every sample is kept,
    judged by the error against x of what will be stored; the plain small picture is the first of
    them, so no sample gets worse. The published program keeps the last iterate, and judges small
    pictures that are not quantised.

    Args:
        down: makes pictures small; differentiable. Weights that need no gradient should not ask
            for one: ``model.requires_grad_(False)``.
        up: rebuilds them; deterministic and differentiable.
        x: ``(B, C, H, W)``.
        steps_hr: steps of the first search; 0 leaves it out.
        steps_lr: steps of the second; 0 leaves it out.
        eps: radius around the start, of a whole sample for ``l2``, of every value for ``linf``;
            None for 0.3 and 4/255.
        alpha: size of a step, likewise; None for 20/255 and 1/255.
        norm: of the ball and of the steps.
        quantise: round the result to 8 bits and judge it so.
        straight_through: search with the rounding in place and its gradient passed on; False
            searches without rounding, as published, and rounds candidates to judge them.
        lr_target: what the second search wants to rebuild: ``adjusted``, the x + d of the first as
            published, or ``original``.
        value_range: of x and of small pictures, to which candidates are clamped; None for latents.
        restarts: random starts of every search.
        seeds: ``(B,)`` int64; None for 0, 1, ... A sample's draws depend on its own alone.

    Raises:
        ConfigError: settings that make no sense.
    """
    eps, alpha = _check(norm, lr_target, eps, alpha, quantise, value_range, restarts)
    seeds = torch.arange(len(x)) if seeds is None else seeds
    ball = _Ball(norm, eps, alpha, value_range, restarts, seeds.to(x.device))
    rounded = to_8_bits if quantise else _same
    inside = rounded if straight_through else _same
    calls = 0

    def rebuild(small: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return up(small)

    def adjusted(point: Tensor) -> tuple[Tensor, Tensor]:
        error = _error(rebuild(inside(down(point))), x)
        return error, error

    def changed(point: Tensor) -> tuple[Tensor, Tensor]:
        rebuilt = rebuild(inside(point))
        error = _error(rebuilt, target)
        if inside is rounded:
            return error, _error(rebuilt, x)
        with torch.no_grad():
            return error, _error(rebuild(rounded(point)), x)

    x = x.detach()
    with torch.no_grad():
        plain = down(x)
        before = _error(rebuild(rounded(plain)), x)
    high = _search(x, adjusted, steps_hr, ball, stage=0)
    target = high if lr_target == "adjusted" else x
    with torch.no_grad():
        small = down(high)
        if value_range is not None:
            small = small.clamp(*value_range)
        if not straight_through:
            small = rounded(small)
    small = rounded(_search(small, changed, steps_lr, ball, stage=1)).detach()
    with torch.no_grad():
        after = _error(rebuild(small), x)
        better = after < before
        kept = torch.where(better.view(-1, *[1] * (small.dim() - 1)), small, rounded(plain))
    return Collaborative(kept, before, torch.where(better, after, before), calls)


@dataclass(frozen=True, slots=True)
class _Ball:
    """Where a search may go, and how it starts and steps."""

    norm: Norm
    eps: float
    alpha: float
    value_range: tuple[float, float] | None
    restarts: int
    seeds: Tensor

    def start(self, base: Tensor, stage: int, restart: int) -> Tensor:
        """Return a point in a random direction, at a distance uniform in [0, eps]."""
        keys = key(self.seeds, stage, restart, Purpose.NEIGHBOUR)
        shape = tuple(base.shape[1:])
        if self.norm == "linf":
            return self.project(base, (2.0 * uniform(keys, shape) - 1.0).to(base) * self.eps)
        direction = normal(keys, shape).to(base)
        radius = (uniform(key(keys, 1)) * self.eps).to(base)
        return self.project(base, _along(direction, radius))

    def step(self, base: Tensor, point: Tensor, grad: Tensor) -> Tensor:
        """Go down the gradient by alpha, and back into the ball and the range."""
        if self.norm == "linf":
            return self.project(base, point - base - self.alpha * grad.sign())
        full = torch.full_like(grad.flatten(1)[:, 0], self.alpha)
        return self.project(base, point - base - _along(grad, full))

    def project(self, base: Tensor, offset: Tensor) -> Tensor:
        if self.norm == "linf":
            offset = offset.clamp(-self.eps, self.eps)
        else:
            length = offset.flatten(1).norm(dim=1)
            offset = _along(offset, length.clamp(max=self.eps))
        point = base + offset
        return point if self.value_range is None else point.clamp(*self.value_range)


def _search(
    base: Tensor,
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    steps: int,
    ball: _Ball,
    stage: int,
) -> Tensor:
    """Return the best of all points visited, sample by sample.

    Args:
        base: the centre, which is the first candidate.
        evaluate: a point's loss, whose gradient is followed, and its score; both ``(B,)``.
        steps: projected gradient steps a restart.
        ball: where to go.
        stage: part of the keys of random starts.
    """
    if steps == 0:
        return base
    with torch.no_grad():
        best, least = base, evaluate(base)[1]

    def keep(point: Tensor, score: Tensor) -> None:
        nonlocal best, least
        better = score < least
        best = torch.where(better.view(-1, *[1] * (point.dim() - 1)), point, best)
        least = torch.where(better, score, least)

    for restart in range(ball.restarts):
        point = ball.start(base, stage, restart)
        for _ in range(steps):
            with torch.enable_grad():
                point = point.detach().requires_grad_()
                loss, score = evaluate(point)
                (grad,) = torch.autograd.grad(loss.sum(), point)
            keep(point.detach(), score.detach())
            point = ball.step(base, point.detach(), grad)
        with torch.no_grad():
            keep(point, evaluate(point)[1])
    return best


def _error(made: Tensor, target: Tensor) -> Tensor:
    return (made.float() - target.float()).square().flatten(1).mean(1)


def _along(direction: Tensor, length: Tensor) -> Tensor:
    """Return vectors of these lengths ``(B,)`` in the directions of ``direction``."""
    own = direction.flatten(1).norm(dim=1)
    return direction * (length / (own + 1e-10)).view(-1, *[1] * (direction.dim() - 1))


def _same(x: Tensor) -> Tensor:
    return x


def _check(
    norm: str,
    lr_target: str,
    eps: float | None,
    alpha: float | None,
    quantise: bool,
    value_range: tuple[float, float] | None,
    restarts: int,
) -> tuple[float, float]:
    """Return eps and alpha, or say what is wrong."""
    known: Sequence[tuple[str, str, tuple[str, ...]]] = (
        ("norm", norm, get_args(Norm)),
        ("lr_target", lr_target, get_args(Target)),
    )
    for name, given, names in known:
        if given not in names:
            raise ConfigError(
                f"{name} is '{given}', expected one of {', '.join(names)}."
                f"{did_you_mean(given, names)}"
            )
    if quantise and value_range != (0.0, 1.0):
        raise ConfigError(
            f"quantise=true rounds values in [0, 1] to 8 bits, but value_range is {value_range}; "
            "give (0.0, 1.0), or quantise=false for latents."
        )
    eps = _RADIUS[norm] if eps is None else eps
    alpha = _STEP[norm] if alpha is None else alpha
    if eps <= 0 or alpha <= 0 or restarts < 1:
        raise ConfigError(
            "eps and alpha must be positive and restarts at least 1, but "
            f"eps={eps}, alpha={alpha} and restarts={restarts} were given; change them."
        )
    return eps, alpha
