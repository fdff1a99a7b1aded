"""What a network computed last reaches its next call, also between the two calls of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.conditioning.base import NULL_LABEL, Conditioning
from genscale.guidance.cfg import ClassifierFree
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.memory import with_latest
from genscale.objectives.paths import VarianceExploding
from genscale.samplers.grid import GridSampler
from genscale.samplers.ode import DPM2, Euler, Heun
from genscale.samplers.schedules import Karras


class Counting(Denoiser):
    """Its latents are the number of the call, by branch; beside them it counts committed steps."""

    def __init__(self) -> None:
        self.process, self.sample_shape = VarianceExploding(), (2, 2)
        self.device = torch.device("cpu")
        self.seen: list[list[float]] = []  # latents that each call was given, by row

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        assert cond.labels is not None
        n = len(x)
        given = torch.zeros(n, 1, 1) if memory is None else memory["latents"]["latents"]
        steps = torch.zeros(n) if memory is None else memory["steps"]
        self.seen.append(given[:, 0, 0].tolist())
        branch = torch.where(cond.labels == NULL_LABEL, 0.5, 0.0).view(n, 1, 1)
        latents = torch.full((n, 1, 1), float(len(self.seen))) + branch
        clean = x / (1 + on(level.sigma, x) ** 2)
        kept = {
            "latents": {"latents": latents, "known": torch.ones(n, dtype=torch.bool)},
            "steps": steps + 1,
        }
        noise = (x - clean) / on(level.sigma, x)
        return Prediction(clean, noise, kept, torch.ones(n, dtype=torch.float64))


LABELS = Conditioning(labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("kind", [Heun, DPM2, Euler])
def test_every_call_is_given_the_latents_of_the_call_before(kind: type[GridSampler]) -> None:
    sampler, network = kind(4, schedule=Karras()), Counting()
    state = sampler.run(network, LABELS, torch.arange(2))
    assert network.seen == [[float(i)] * 2 for i in range(len(network.seen))]
    assert len(network.seen) == sampler.nfe(0, 4)
    # what goes by steps sees one evaluation a step
    assert state.memory["steps"].tolist() == [4.0, 4.0]


def test_each_branch_of_guidance_has_its_own() -> None:
    network = Counting()
    Heun(3, schedule=Karras()).run(ClassifierFree(2.0).wrap(network), LABELS, torch.arange(2))
    # conditional rows, then unconditional ones
    assert network.seen[1:] == [[i, i, i + 0.5, i + 0.5] for i in map(float, range(1, 5))]


def test_rows_at_different_steps_carry_their_own() -> None:
    sampler, network = Heun(3, schedule=Karras()), Counting()
    early = sampler.start(network, LABELS, torch.arange(2))
    late = early
    for _ in range(2):
        late = sampler.advance(network, late)
    early = sampler.advance(network, early)
    rows = torch.tensor([0])
    joined = type(early).cat([early.select(rows), late.select(rows)])
    calls = len(network.seen)
    state = sampler.advance(network, joined)
    # the second row takes its last step, which has no second evaluation
    assert [len(call) for call in network.seen[calls:]] == [2, 1]
    first, second = calls + 1, calls + 2
    assert state.memory["latents"]["latents"][:, 0, 0].tolist() == [second, first]
    # and looking twice changes nothing
    again = sampler.evaluate(network, early)
    assert again.memory is early.memory


def test_only_latents_are_the_latest() -> None:
    def memory(value: float) -> dict[str, Any]:
        rows = torch.full((2,), value)
        return {"conditional": {"latents": rows, "known": rows > 0}, "null": None, "kept": rows}

    found = with_latest(memory(1.0), memory(2.0), torch.tensor([0, 1]))
    assert found["conditional"]["latents"].tolist() == [2.0, 2.0]
    assert found["kept"].tolist() == [1.0, 1.0]
    assert found["null"] is None
    assert with_latest(None, memory(2.0), torch.tensor([0])) is None
    assert with_latest(memory(1.0), None, torch.tensor([0]))["kept"].tolist() == [1.0, 1.0]
