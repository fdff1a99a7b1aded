"""Videos made block by block: with a cache the numbers are those without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.causal_video import CausalVideo
from genscale.conditioning.base import Conditioning
from genscale.layers.block_mask import block_spans
from genscale.layers.video_cache import VIDEO_CACHE, commit_frames, frames_held
from genscale.objectives.memory import cat_tensors, take_rows
from tests.backbones.test_causal_video import build, clip, condition, times

CLEAN = torch.zeros(1)


def spans(model: CausalVideo, frames: int) -> tuple[tuple[int, int], ...]:
    return block_spans(frames, model.block_size, short_first=model.independent_first_frame)


@torch.no_grad()
def roll_out(
    model: CausalVideo, x: Tensor, t: Tensor, clean: Tensor, cond: Conditioning | None = None
) -> tuple[Tensor, Any]:
    """Predict every block after the finished ones before it; also return the memory."""
    cond = condition(model) if cond is None else cond
    memory, parts = model.begin(len(x), "cpu", x.dtype), []
    for start, stop in spans(model, x.shape[2]):
        output = model(x[:, :, start:stop], t[:, start:stop], cond, memory)
        parts.append(output.sample)
        memory = model(clean[:, :, start:stop], CLEAN, cond, output.memory).memory
        memory = commit_frames(memory, stop - start)
    return torch.cat(parts, dim=2), memory


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"independent_first_frame": True, "input_size": [7, 8, 8]},
        {"window": 4, "cache": "rolling"},
        {"window": 5, "sink": 1, "cache": "rolling", "positions": "absolute"},
        {"num_classes": 0, "text_size": 0},
        {"attend_padding": True},
        # every token of every chunk is kept and read again
        {"cache": "semantic", "bank_share": 1.0, "bank_top": 9},
    ],
    ids=str,
)
def test_cached_equals_teacher_forced(changes: dict[str, Any]) -> None:
    model = build(**changes)
    x, t, clean = clip(model), times(model), clip(model, 1)
    expected = model(x, t, condition(model), clean=clean).sample
    torch.testing.assert_close(roll_out(model, x, t, clean)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"window": 4, "cache": "rolling"}], ids=str)
def test_several_blocks_at_once_are_block_causal_among_themselves(changes: dict[str, Any]) -> None:
    model = build(**changes)
    x, t, cond = clip(model), times(model), condition(model)
    expected = model(x, t, cond).sample  # nobody is clean: all see what comes before as it is
    with torch.no_grad():
        memory = model.begin(2, "cpu", shape=(2, 8, 8, 8))
        first = model(x[:, :, :4], t[:, :4], cond, memory)
        memory = commit_frames(first.memory, 4)
        second = model(x[:, :, 4:], t[:, 4:], cond, memory)
    found = torch.cat((first.sample, second.sample), dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sink", [0, 2])
def test_relative_positions_are_absolute_ones_up_to_the_trained_length(sink: int) -> None:
    x = clip(build())
    for positions in ("relative", "auto"):
        settings: dict[str, Any] = {"cache": "rolling", "sink": sink}
        own, other = (build(**settings, positions=word) for word in ("absolute", positions))
        t = times(own)
        one, two = (roll_out(model, x, t, x)[0] for model in (own, other))
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_beyond_the_trained_length_the_sink_stays_near() -> None:
    x = clip(build()).repeat(1, 1, 3, 1, 1)
    t = torch.full((2, 24), 500.0)
    found = {
        positions: roll_out(build(cache="rolling", sink=2, positions=positions), x, t, x)[0]
        for positions in ("absolute", "relative", "auto")
    }
    torch.testing.assert_close(found["auto"], found["relative"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["auto"][:, :, 16:], found["absolute"][:, :, 16:], atol=1e-3)
    # the window is full and its contents repeat with the clip: so do the predictions
    period = found["relative"][:, :, 12:16], found["relative"][:, :, 20:24]
    torch.testing.assert_close(*period, rtol=1e-2, atol=1e-2)


def test_a_rolling_window_takes_the_same_memory_for_any_length() -> None:
    model = build(cache="rolling", cache_window=6, sink=2)

    def numbers(frames: int) -> int:
        x = torch.zeros(2, 2, frames, 8, 8)
        _, memory = roll_out(model, x, torch.zeros(1, frames), x)
        cache = memory[VIDEO_CACHE]
        assert frames_held(cache) == 4  # and a block to come
        return sum(tensor.numel() for tensor in [*cache["keys"], *cache["values"], cache["ids"]])

    assert numbers(8) == numbers(40)


def test_particles_take_their_history_along() -> None:
    model = build(cache="semantic")
    x, t, clean, cond = clip(model), times(model), clip(model, 1), condition(model)
    _, memory = roll_out(model, x, t, clean)
    following = clip(model, 2)[:, :, :2]
    expected = model(following, t[:, :2], cond, memory).sample
    index = torch.tensor([1, 1, 0])
    picked = cat_tensors([take_rows(memory, index), take_rows(memory, torch.tensor([0]))])
    index = torch.tensor([1, 1, 0, 0])
    found = model(following[index], t[index, :2], cond.select(index), picked).sample
    torch.testing.assert_close(found, expected[index], rtol=1e-4, atol=1e-5)


def test_branches_of_one_memory_do_not_disturb_each_other() -> None:
    model = build()
    x, t, cond = clip(model), times(model), condition(model)
    _, memory = roll_out(model, x[:, :, :4], t[:, :4], x[:, :, :4])

    @torch.no_grad()
    def go_on(memory: Any, seed: int) -> Any:
        frames = clip(model, seed)[:, :, :2]
        return commit_frames(model(frames, CLEAN, cond, memory).memory, 2)

    def ask(memory: Any) -> Tensor:
        sample: Tensor = model(x[:, :, 6:], t[:, 6:], cond, memory).sample
        return sample

    expected = ask(go_on(memory, 5))
    left = go_on(memory, 5)
    go_on(go_on(memory, 6), 8)
    torch.testing.assert_close(ask(left), expected)


def test_the_text_is_projected_once_and_anew_when_it_changes() -> None:
    model = build(num_classes=0)
    x, cond = clip(model)[:, :, :2], condition(model)
    calls: list[int] = []
    model.text_1.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    with torch.no_grad():
        memory = model.begin(2, "cpu")
        for _ in range(3):
            memory = model(x, CLEAN, cond, memory).memory
        assert len(calls) == 1
        copy = Conditioning(text=cond.text.clone(), text_mask=cond.text_mask)  # type: ignore[union-attr]
        memory = model(x, CLEAN, copy, memory).memory
        assert len(calls) == 1
        null = model(x, CLEAN, cond.null(), memory)
        assert len(calls) == 2
    torch.testing.assert_close(null.sample, model(x, CLEAN, cond.null()).sample)


def test_gradients_with_a_cache_are_those_of_teacher_forcing() -> None:
    model = build(num_classes=0)
    x, t, clean, cond = clip(model), times(model), clip(model, 1), condition(model)
    expected = model(x, t, cond, clean=clean).sample[:, :, 4:6].square().sum()
    _, memory = roll_out(model, x[:, :, :4], t[:, :4], clean[:, :, :4])
    noisy = x[:, :, 4:6].clone().requires_grad_(True)
    output = model(noisy, t[:, 4:6], cond, memory)
    with torch.no_grad():  # the block is finished before its gradient is taken
        model(clean[:, :, 4:6], CLEAN, cond, output.memory)
    loss = output.sample.square().sum()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    x.requires_grad_(True)
    (wanted,) = torch.autograd.grad(
        model(x, t, cond, clean=clean).sample[:, :, 4:6].square().sum(), x
    )
    torch.testing.assert_close(noisy.grad, wanted[:, :, 4:6], rtol=1e-4, atol=1e-5)
    weight = model.text_1.weight.grad  # type: ignore[union-attr]
    assert weight is not None
    assert weight.any()


def test_a_semantic_cache_reads_the_chunks_of_the_same_prompt_again() -> None:
    model = build(num_classes=0, cache="semantic", bank_top=1)
    x = clip(model)
    cats, dogs = (Conditioning(text=torch.full((2, 2, 5), value)) for value in (1.0, -1.0))

    @torch.no_grad()
    def story(first: Tensor, second: Tensor) -> Tensor:
        memory = model.begin(2, "cpu")
        for frames, cond in ((first, cats), (second, dogs), (x[:, :, 4:6], dogs)):
            memory = commit_frames(model(frames, CLEAN, cond, memory).memory, 2)
        assert memory[VIDEO_CACHE]["bank"]["first"].tolist() == [[0, 2]] * 2
        # layer 0 keeps keys that do not depend on what came before them
        sample: Tensor = model(x[:, :, 6:], CLEAN, cats, memory).sample
        return sample

    base = story(x[:, :, :2], x[:, :, 2:4])
    assert not torch.allclose(base, story(-x[:, :, :2], x[:, :, 2:4]), atol=1e-3)


def test_a_memory_of_another_shape_is_refused() -> None:
    model = build()
    memory = model.begin(2, "cpu")
    with pytest.raises(ValueError, match="of 2 videos with 4 tokens a frame, but x is of 3 with 4"):
        model(clip(model, batch=3), CLEAN, Conditioning(), memory)
    wide = torch.zeros(2, 2, 2, 8, 16)
    with pytest.raises(ValueError, match=r"but x is of 2 with 8\. Begin one for x's shape"):
        model(wide, CLEAN, Conditioning(), memory)
    assert model(wide, CLEAN, Conditioning(), model.begin(2, "cpu", shape=(2, 2, 8, 16))).memory
