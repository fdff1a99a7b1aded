"""D2D's loop: a counting critic's gradient moves the noise until the count is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.data.scenes.grammar import Scene, SceneObject
from genscale.data.scenes.renderer import render
from genscale.objectives.base import Level, Prediction, on
from genscale.rewards.base import Request
from genscale.rewards.counting import D2D
from genscale.rewards.scene_detector import SceneDetector
from genscale.samplers.ode import Euler
from genscale.search.noise_opt import NoiseOptimisation
from genscale.search.plain import PlainSampling
from tests.search.conftest import Gaussian

PLACES = [(0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)]


def _circles(count: int, first: int) -> Tensor:
    chosen = [PLACES[(first + i) % 4] for i in range(count)]
    scene = Scene("black", tuple(SceneObject("circle", "red", x, y, 0.31) for x, y in chosen))
    return torch.from_numpy(render(scene, 32)).float() / 127.5 - 1.0


class Circles(Gaussian):
    """Exact denoiser of pictures of one, two or three red circles, and a little grain."""

    def __init__(self) -> None:
        super().__init__(std=0.15)
        self.sample_shape = (3, 32, 32)
        self.pictures = torch.stack([_circles(n, at) for n in (1, 2, 3) for at in range(4)])

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        alpha, sigma = on(level.alpha, x), on(level.sigma, x)
        variance = (alpha * self.std) ** 2 + sigma**2
        off = x[:, None] - alpha[:, None] * self.pictures
        share = torch.softmax(-0.5 * (off.square() / variance[:, None]).flatten(2).sum(2), 1)
        mean = (share @ self.pictures.flatten(1)).view_as(x)
        clean = mean + alpha * self.std**2 / variance * (x - alpha * mean)
        noise = (x - alpha * clean) / sigma
        return Prediction(clean, noise, None, torch.ones(len(x), dtype=torch.float64))


@pytest.mark.parametrize(
    "settings", [{}, {"param": "modifier", "optimiser": "adam", "rate": 3e-2, "clip": None}]
)
def test_wrong_counts_are_mended(engines: Any, settings: dict[str, Any]) -> None:
    asked: dict[str, Any] = {
        "prompts": 6,
        "model": Circles(),
        "sampler": Euler(4),
        "reward": D2D(SceneDetector()),
        "requests": [Request(caption="two red circles")] * 6,
        "decode": lambda latents: latents,
    }
    plain = PlainSampling().run(engines(**asked))
    wrong = plain.rewards["wrong"]
    assert int((wrong > 0).sum()) == 4
    result = NoiseOptimisation(10, **settings).run(engines(**asked))
    assert (result.rewards["wrong"] <= wrong).all()
    assert result.rewards["wrong"].sum() < wrong.sum()
    # right counts with the margin twice in a row end a prompt
    ended = result.extra["iterations"] < 10
    assert (result.rewards["met"][ended] == 1).all()
    if not settings:
        assert ended[wrong == 0].all()
