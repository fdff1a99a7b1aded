"""Windows and dilated samples: what is cut apart comes together again, and how models see it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from genscale import rng
from genscale.backbones.base import BackboneOutput
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.resolution import apply_resolution
from genscale.resolution.windows import (
    DilatedSampling,
    WindowFusion,
    call_in_batches,
    crop_windows,
    fuse_windows,
    interaction,
    jittered,
    merge_dilated,
    mix_dilated,
    split_dilated,
    take_samples,
    window_boxes,
    window_starts,
)


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apply(op, model=None):
    return apply_resolution(model or nn.Identity(), [op], native=(4, 4), target=(8, 8))


def test_the_last_window_is_moved_back_inside() -> None:
    assert window_starts(10, 4, 4) == [0, 4, 6]
    assert window_starts(8, 4, 2) == [0, 2, 4]
    assert window_starts(4, 4, 2) == window_starts(3, 4, 2) == [0]
    assert window_boxes(4, 6, 4, 2) == [(0, 4, 0, 4), (0, 4, 2, 6)]
    with pytest.raises(ConfigError, match="between 1 and their side 4"):
        window_boxes(8, 8, 4, 5)


def test_windows_of_a_picture_average_to_the_picture() -> None:
    x, boxes = sample(2, 3, 9, 10), window_boxes(9, 10, 4, 3)
    parts = crop_windows(x, boxes)
    assert parts.shape == (len(boxes) * 2, 3, 4, 4)
    torch.testing.assert_close(fuse_windows(parts, boxes, 9, 10), x)
    ones = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 4, 4)  # windows of zeros and of ones
    fused = fuse_windows(ones, [(0, 4, 0, 4), (0, 4, 2, 6)], 4, 6)
    assert fused[0, 0, 0].tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_jitter_stays_in_its_range_and_leaves_no_gap() -> None:
    boxes, j = window_boxes(20, 20, 8, 4), 2
    for seed in range(20):
        keys = rng.key(seed, torch.arange(2))
        moved = jittered(boxes, 20, 20, j, keys)
        covered = torch.zeros(24, 24)
        for (top, _, left, right), (new_top, new_bottom, new_left, new_right) in zip(
            boxes, moved, strict=True
        ):
            assert (new_bottom - new_top, new_right - new_left) == (8, 8)
            assert abs(new_top - j - top) <= j
            assert abs(new_left - j - left) <= j
            assert top > 0 or new_top <= j
            assert right < 20 or new_left >= left + j
            assert new_top >= 0
            assert new_bottom <= 24
            covered[new_top:new_bottom, new_left:new_right] = 1
        assert covered[j:-j, j:-j].all()
    whole = jittered([(0, 8, 0, 8)], 8, 8, j, rng.key(0, torch.arange(2)))
    assert whole == [(2, 10, 2, 10)]


@pytest.mark.parametrize(("height", "width"), [(6, 8), (7, 5)])
def test_interleaved_samples_are_put_together_again(height: int, width: int) -> None:
    x = sample(2, 3, height, width)
    parts = split_dilated(x, 2)
    assert parts.shape == (8, 3, -(-height // 2), -(-width // 2))
    assert torch.equal(merge_dilated(parts, 2, height, width), x)
    if height == 6:
        assert torch.equal(parts[2:4], x[..., 0::2, 1::2])  # second part: even rows, odd columns


def test_mixing_permutes_every_cell_on_its_own_and_is_undone() -> None:
    parts = split_dilated(sample(1, 2, 8, 8), 2)
    order = interaction(4, (1, 2, 4, 4), rng.key(3))
    mixed = mix_dilated(parts, order)
    assert not torch.equal(mixed, parts)
    torch.testing.assert_close(mixed.sort(dim=0).values, parts.sort(dim=0).values)
    assert torch.equal(mix_dilated(mixed, order, inverse=True), parts)
    assert (order != order[:, :, :1, :1, :1]).any()


def test_arguments_follow_their_samples() -> None:
    index = torch.tensor([1, 0, 1])
    assert take_samples(torch.tensor([5, 6]), index, 2).tolist() == [6, 5, 6]
    assert take_samples(torch.tensor([5]), index, 2).tolist() == [5]  # shared by all
    cond = take_samples(Conditioning(labels=torch.tensor([7, 8])), index, 2)
    assert cond.labels.tolist() == [8, 7, 8]
    assert take_samples({"a": torch.tensor([5, 6])}, index, 2)["a"].tolist() == [6, 5, 6]
    assert take_samples("word", index, 2) == "word"


def scaled_by_label(x: Tensor, t: Tensor, cond: Conditioning) -> BackboneOutput:
    """A model that works on single cells: any cut must give the same as the whole."""
    return BackboneOutput(sample=x * t.view(-1, 1, 1, 1) + cond.labels.view(-1, 1, 1, 1))


@pytest.mark.parametrize("budget", [None, 1, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda budget: WindowFusion(view_batch_size=budget),
        lambda budget: WindowFusion(stride=2, jitter=1, view_batch_size=budget),
        lambda budget: DilatedSampling(view_batch_size=budget),
        lambda budget: DilatedSampling(interact=True, view_batch_size=budget),
    ],
)
def test_a_model_of_single_cells_gives_the_same_in_parts_as_in_whole(make, budget) -> None:
    x, t = sample(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    cond = Conditioning(labels=torch.tensor([0, 3]))
    sizes: list[tuple[int, ...]] = []

    def model(x: Tensor, t: Tensor, cond: Conditioning) -> BackboneOutput:
        sizes.append(tuple(x.shape))
        return scaled_by_label(x, t, cond)

    with apply(make(budget)) as scaled:
        scaled.pre_step(x, 1.0, 4)
        got = scaled.wrap_model(model)(x, t, cond).sample
    torch.testing.assert_close(got, scaled_by_label(x, t, cond).sample)
    assert {shape[2:] for shape in sizes} == {(4, 4)}  # the trained size, always
    assert max(shape[0] for shape in sizes) <= (budget or 1000)


def test_calls_in_batches_accept_models_that_return_tensors() -> None:
    parts, t = sample(6, 1, 2, 2), torch.tensor([1.0, 2.0])
    got = call_in_batches(lambda x, t: x * t.view(-1, 1, 1, 1), parts, 2, (t,), {}, 4)
    torch.testing.assert_close(got, parts * torch.tensor([1.0, 2.0] * 3).view(-1, 1, 1, 1))


def test_jitter_that_would_leave_gaps_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match="at most 0 cells to leave no gap"),
        apply(WindowFusion(stride=3, jitter=1)),
    ):
        pass
