"""The sampler of block-causal video with the real network, whatever its cache keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.causal_video import CausalVideo
from genscale.conditioning.base import Conditioning
from genscale.guidance.cfg import ClassifierFree
from genscale.objectives.diffusion_forcing import DiffusionForcing
from genscale.objectives.network import NetworkView
from genscale.samplers.base import State
from genscale.samplers.blocks import Blocks
from genscale.samplers.ode import Euler

CACHES: dict[str, dict[str, Any]] = {
    "full": {"cache": "full"},
    "rolling": {"cache": "rolling", "cache_window": 4, "sink": 1},
    "semantic": {"cache": "semantic", "bank_top": 1},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "autoregressive": {"eta": 0.5},
    "pyramid": {"schedule": "pyramid"},
}
COUNT = 3


def network(**settings: Any) -> CausalVideo:
    torch.manual_seed(0)
    video = CausalVideo(
        input_size=[4, 4, 4], in_channels=2, patch_size=2, hidden_size=24, depth=1, num_heads=2,
        mlp_size=32, frequency_size=16, num_classes=3, block_size=2, **settings,
    )  # fmt: skip
    with torch.no_grad():  # a fresh head says nothing
        video.head.linear.weight.normal_(std=0.2)
    return video.eval().requires_grad_(False)


def begin(sampler: Blocks, view: Any, rows: list[int] | None = None) -> State:
    labels = torch.arange(COUNT) if rows is None else torch.tensor(rows)
    return sampler.start(view, Conditioning(labels=labels), labels + 100)


def end(sampler: Blocks, view: Any, state: State) -> Tensor:
    while int(state.step.min()) < sampler.num_steps:
        state = sampler.advance(view, state)
    return sampler.finish(state)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
class TestVideos:
    """Videos of twice the trained length, guided."""

    def sampler(self, schedule: dict[str, Any]) -> Blocks:
        return Blocks(2, block_size=2, trained_frames=4, frames=8, **schedule)

    def view(self, cache: dict[str, Any]) -> Any:
        return ClassifierFree(1.5).wrap(DiffusionForcing().view(network(**cache)))

    def test_a_video_is_its_own_in_any_company(self, cache: Any, schedule: Any) -> None:
        sampler, view = self.sampler(schedule), self.view(cache)
        whole = end(sampler, view, begin(sampler, view))
        assert bool(whole.isfinite().all())
        for rows in ([2], [1, 0]):
            alone = end(sampler, view, begin(sampler, view, rows))
            torch.testing.assert_close(alone, whole[rows], rtol=1e-4, atol=1e-5)

    def test_particles_at_different_steps_go_together(self, cache: Any, schedule: Any) -> None:
        sampler, view = self.sampler(schedule), self.view(cache)
        state = begin(sampler, view)
        separate = end(sampler, view, state)
        if cache["cache"] == "semantic":
            ahead = state.select(torch.tensor([0]))
            while int(ahead.step[0]) < sampler.num_steps - 1:
                ahead = sampler.advance(view, ahead)
            with pytest.raises(ValueError, match="chunks cannot be held together"):
                State.cat([state, ahead])
            return
        parts = []
        for row, ahead in enumerate((0, 1, sampler.num_steps // 2)):
            part = state.select(torch.tensor([row]))
            for _ in range(ahead):
                part = sampler.advance(view, part)
            parts.append(part)
        mixed = sampler.evaluate(view, State.cat(parts))
        torch.testing.assert_close(end(sampler, view, mixed), separate, rtol=1e-4, atol=1e-5)

    def test_parts_of_a_batch_are_joined_on_the_way(self, cache: Any, schedule: Any) -> None:
        sampler, view = self.sampler(schedule), self.view(cache)
        state = begin(sampler, view)
        whole = end(sampler, view, state)
        for _ in range(sampler.num_steps - 1):  # as a search in micro-batches does
            parts = [state.select(torch.tensor(rows)) for rows in ([0, 1], [2])]
            state = State.cat([sampler.advance(view, part) for part in parts])
        found = end(sampler, view, state)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)

    def test_copies_go_on_as_they_would_have(self, cache: Any, schedule: Any) -> None:
        sampler, view = self.sampler(schedule), self.view(cache)
        state = begin(sampler, view)
        whole = end(sampler, view, state)
        index = torch.tensor([2, 0, 2])
        for _ in range(sampler.num_steps // 2):
            state = sampler.advance(view, state)
        copies = sampler.evaluate(view, state).select(index)
        found = end(sampler, view, copies)
        torch.testing.assert_close(found, whole[index], rtol=1e-4, atol=1e-5)
        # and the state that was copied from has lost nothing
        torch.testing.assert_close(end(sampler, view, state), whole, rtol=1e-4, atol=1e-5)


def test_the_full_sequence_is_any_solver_on_the_whole_clip() -> None:
    """Cached or not, a clip of the trained length is seen block-causally."""
    video, objective = network(), DiffusionForcing()
    sampler = Blocks(4, schedule="full_sequence", block_size=2, trained_frames=4, shift=2.0)
    state = begin(sampler, objective.view(video))
    plain = NetworkView(video, objective.process, "velocity", "index")
    expected = Euler(4, shift=2.0).run(plain, state.cond, state.seeds, state.x)
    found = end(sampler, objective.view(video), state)
    torch.testing.assert_close(found, expected.x, rtol=1e-4, atol=1e-5)
