"""Self-conditioning in training: a first evaluation is remembered, and teaches nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genscale import rng
from genscale.backbones.base import BackboneOutput
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import Batch
from genscale.objectives.edm import EDM
from genscale.objectives.self_conditioning import remembered
from genscale.rng import Purpose

SHAPE = (2, 4)


class Remembering(nn.Module):
    """Latents = first(x) + share(what it remembers), prediction = second(latents)."""

    self_conditioning = True

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.sample_shape = SHAPE
        self.first, self.share, self.second = (nn.Linear(4, 4, bias=False) for _ in range(3))
        for layer in (self.first, self.share, self.second):
            layer.weight.data.normal_(std=0.5, generator=generator)
        self.calls: list[Any] = []

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None) -> Any:
        self.calls.append((x, t, memory))
        latents = self.first(x)
        if memory is not None:
            known = memory["known"].view(-1, 1, 1)
            latents = latents + known * self.share(memory["latents"].to(x))
        everywhere = torch.ones(len(x), dtype=torch.bool)
        return BackboneOutput(self.second(latents), {"latents": latents, "known": everywhere})


class Forgetful(Remembering):
    self_conditioning = False


def batch_of(count: int) -> tuple[Batch, rng.StepRandom]:
    position = torch.arange(count)
    clean = rng.normal(rng.key(1, position), SHAPE)
    return Batch(clean, Conditioning(), position), rng.for_step(0, position)


def gradients(network: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def test_nothing_is_evaluated_twice_where_nothing_is_remembered() -> None:
    network = Remembering()
    EDM().loss(network, *batch_of(3))  # type: ignore[arg-type]
    assert len(network.calls) == 1
    assert network.calls[0][2] is None


def test_the_first_evaluation_is_at_the_same_x_and_time() -> None:
    network, (batch, draws) = Remembering(), batch_of(200)
    EDM(self_conditioning=0.9).loss(network, batch, draws)  # type: ignore[arg-type]
    (x, t, nothing), (again, moment, memory) = network.calls
    assert nothing is None
    assert torch.equal(x, again)
    assert torch.equal(t, moment)
    # the draw is keyed by each sample's place in the stream
    assert torch.equal(memory["known"], draws.uniform(Purpose.SELF_CONDITION) < 0.9)
    assert 0.8 < float(memory["known"].float().mean()) < 0.99
    assert torch.equal(memory["latents"], network.first(x))


def test_gradients_flow_through_the_second_evaluation_only() -> None:
    objective, (batch, draws) = EDM(self_conditioning=1.0), batch_of(5)
    network = Remembering()
    objective.loss(network, batch, draws).loss.backward()  # type: ignore[arg-type]
    found = gradients(network)
    _, _, memory = network.calls[1]
    assert not memory["latents"].requires_grad

    # the same gradients where the latents are a constant that came from elsewhere
    other = Remembering()
    constant = {"latents": memory["latents"].clone(), "known": memory["known"]}
    target_minus = []

    class Handed(Remembering):
        def forward(self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None) -> Any:
            out = other(x, t, cond, constant)
            target_minus.append(out.sample)
            return out

    EDM().loss(Handed(), batch, draws).loss.backward()  # type: ignore[arg-type]
    assert len(target_minus) == 1
    for ours, theirs in zip(found, gradients(other), strict=True):
        assert torch.equal(ours, theirs)


def test_samples_that_do_not_remember_train_as_if_alone() -> None:
    batch, draws = batch_of(40)
    objective = EDM(self_conditioning=0.5)
    network = Remembering()
    known = draws.uniform(Purpose.SELF_CONDITION) < 0.5
    with_memory = objective.loss(network, batch, draws).per_sample  # type: ignore[arg-type]
    without = EDM().loss(Remembering(), batch, draws).per_sample  # type: ignore[arg-type]
    assert 0 < int(known.sum()) < 40
    assert torch.equal(with_memory[~known], without[~known])
    assert not torch.isclose(with_memory[known], without[known]).any()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_autocast_loses_no_gradient(share: float) -> None:
    """Weights cast without gradients in the first evaluation are cast anew in the second."""
    network = Remembering()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = EDM(self_conditioning=share).loss(network, *batch_of(4))  # type: ignore[arg-type]
    out.loss.backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == (
        ["share.weight"] if share == 0.0 else []
    )
    assert all(bool((gradient != 0).any()) for gradient in gradients(network))
    assert len(network.calls) == (2 if share else 1)


def test_the_first_evaluation_is_cast_as_the_second_and_leaves_no_casts() -> None:
    network, (batch, _) = Remembering(), batch_of(2)
    time = torch.zeros(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        memory = remembered(network, batch.clean, time, batch.cond, torch.ones(2).bool())  # type: ignore[arg-type]
        assert memory["latents"].dtype == torch.bfloat16
        assert torch.is_autocast_cache_enabled()
        assert network(batch.clean, time, batch.cond, memory).sample.requires_grad
    memory = remembered(network, batch.clean, time, batch.cond, torch.ones(2).bool())  # type: ignore[arg-type]
    assert memory["latents"].dtype == torch.float32


def test_a_network_that_remembers_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Forgetful remembers nothing.*self_conditioning=0"):
        EDM(self_conditioning=0.9).loss(Forgetful(), *batch_of(2))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\], but is 1.5"):
        EDM(self_conditioning=1.5)
