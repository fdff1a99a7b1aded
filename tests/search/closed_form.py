"""A law in the plane whose tilt by a linear reward is known: what particle methods must find."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.objectives.schedule import LinearFlow
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.samplers.sde import DDIM
from genscale.search.base import Search, SearchResult
from genscale.search.engine import Engine
from genscale.search.scorer import Scorer
from tests.samplers.conftest import Mixture

# the tilt of component k by exp(a x) has mean m_k + v_k a and weight ~ w_k exp(a m_k + v_k |a|^2/2)
MEANS = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, -2.5]])
STDS = torch.tensor([0.5, 0.3, 0.6])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
TILT = torch.tensor([1.2, -0.6])
TILTED_MEAN = torch.tensor([1.40539, -0.46345], dtype=torch.float64)
_RANGE = 32.0  # of the plane that a picture in [-1, 1] shows


def as_picture(points: Tensor) -> Tensor:
    """Show points ``(n, 2)`` as pictures ``(n, 1, 1, 2)``."""
    return (points / _RANGE).view(-1, 1, 1, 2)


class Linear(Reward):
    """The scalar product of a point with :data:`TILT`."""

    differentiable = True

    def score(self, images: Tensor, handle: tuple[Request, ...], index: Tensor) -> RewardOutput:
        return RewardOutput(((images.flatten(1) * 2 - 1) * _RANGE) @ TILT)


def gaussian(std: float = 0.8) -> Mixture:
    """One component alone."""
    return Mixture(LinearFlow(), torch.tensor([[0.5, -0.3]]), torch.tensor([std]), torch.ones(1))


def plane(
    prompts: int = 1, steps: int = 50, *, model: Any = None, seed: int = 0, **settings: Any
) -> Engine:
    """Return an engine on the plane; every prompt repeats the experiment with other seeds."""
    settings = {"micro_batch": 1 << 14, **settings}
    return Engine(
        DDIM(steps, eta=1.0),
        model or Mixture(LinearFlow(), MEANS, STDS, WEIGHTS),
        Conditioning(),
        torch.arange(prompts) + 1000 * seed,
        Scorer(as_picture, settings.pop("reward", None) or Linear()),
        **settings,
    )


def weighted_means(search: Search, engine: Engine) -> tuple[Tensor, SearchResult]:
    """Return each prompt's mean under its weights ``(G, 2)``; the search returns all."""
    result = search.run(engine)
    points = result.latents.view(engine.num_prompts, -1, 2).double()
    weights = result.extra["log_weights"].exp()
    return (weights[..., None] * points).sum(1), result
