"""Matrices of which frame is how noisy; golden cases hold the official ones (block_schedules)."""

from __future__ import annotations

import math

import pytest
import torch

from genscale.errors import ConfigError
from genscale.objectives.block_schedules import (
    ShiftedTable,
    Staircase,
    autoregressive,
    check_delay,
    full_sequence,
    fused_snr_weights,
    pyramid,
    ramp,
    staircase,
    trapezoid,
)


class TestShiftedTable:
    def test_it_is_the_shifted_flow(self) -> None:
        table = ShiftedTable(5.0)
        even = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
        torch.testing.assert_close(table.sigmas, 5 * even / (1 + 4 * even))
        torch.testing.assert_close(table.timesteps, 1000 * table.sigmas)

    def test_weights_are_a_bell_of_mean_one(self) -> None:
        weights = ShiftedTable(1.0).weights
        assert float(weights.mean()) == pytest.approx(1.0)
        assert int(weights.argmax()) == 500
        assert float(weights.min()) == 0.0

    def test_levels_are_looked_up_by_the_nearest(self) -> None:
        table = ShiftedTable(1.0, num_levels=4)  # timesteps 4, 3, 2, 1
        asked = torch.tensor([[3.4, 3.6], [0.0, 9.0]])
        assert table.place(asked).tolist() == [[1, 0], [3, 0]]
        assert table.sigma_at(asked).tolist() == [[0.75, 1.0], [0.25, 1.0]]
        assert table.next_sigma(asked).tolist() == [[0.5, 0.75], [0.0, 0.75]]
        assert torch.equal(table.weight_at(asked), table.weights[table.place(asked)])

    def test_few_steps_are_warped_by_the_shift(self) -> None:
        warped = ShiftedTable(5.0).warped(torch.tensor([1000, 750, 500, 250, 0]))
        expected = [1000.0, 5 * 750 / 4, 5 * 500 / 3, 5 * 250 / 2, 0.0]  # s t / (1 + (s - 1) t)
        assert warped.tolist() == pytest.approx(expected)

    def test_no_table_without_levels(self) -> None:
        with pytest.raises(ConfigError, match="positive shift and at least 2 levels"):
            ShiftedTable(0.0)


class TestMatrices:
    def test_a_pyramid(self) -> None:
        expected = [[2, 2, 2], [1, 2, 2], [0, 1, 2], [0, 0, 1], [0, 0, 0]]
        assert pyramid(3, 2, 1.0).tolist() == expected
        # delays need not be whole: columns start at rows 0, 1 and 3
        assert pyramid(3, 2, 1.5).argmin(0).tolist() == [2, 3, 5]

    def test_its_ends(self) -> None:
        assert torch.equal(autoregressive(3, 4), pyramid(3, 4, 4))
        assert torch.equal(full_sequence(3, 2), torch.tensor([[2] * 3, [1] * 3, [0] * 3]))

    def test_a_fixed_trapezoid_is_symmetric(self) -> None:
        for length in (5, 6):
            matrix = trapezoid(length, 4, 1.0, fixed=True)
            assert torch.equal(matrix, matrix.flip(1))
            assert bool((matrix[0] == 4).all())
            assert bool((matrix.diff(dim=0) <= 0).all())

    def test_the_official_trapezoid_leaves_a_column_at_zero(self) -> None:
        matrix = trapezoid(6, 4, 1.0)
        assert bool((matrix[:, 3] == 0).all())
        assert torch.equal(matrix[:, 5], matrix[:, 1])  # it should go with column 0


class TestStaircase:
    def test_blocks_start_one_after_the_other(self) -> None:
        found = staircase(3, 2, delay=1, window=3)
        assert isinstance(found, Staircase)
        assert found.index.tolist() == [[1, 0, 0], [2, 1, 0], [3, 2, 1], [3, 3, 2]]
        assert found.update.tolist() == [
            [True, False, False], [True, True, False], [False, True, True], [False, False, True],
        ]  # fmt: skip
        assert found.window.tolist() == [[0, 3]] * 4

    def test_a_delay_beyond_the_steps_is_one_block_at_a_time(self) -> None:
        one, other = (staircase(4, 3, delay=delay, window=4) for delay in (3, 9))
        assert torch.equal(one.index, other.index)

    def test_the_window_slides_where_the_video_is_longer(self) -> None:
        found = staircase(8, 2, delay=1, window=4, block_size=2)
        assert found.window.tolist() == [[0, 4], [0, 4], [2, 6], [4, 8], [4, 8]]
        inside = torch.arange(8)
        for update, (start, end) in zip(found.update, found.window.tolist(), strict=True):
            assert bool(((inside >= start) & (inside < end))[update].all())

    def test_a_window_too_small_for_the_delay_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"at least 4 .* is 3\. Give delay=4"):
            staircase(6, 7, delay=3, window=2)
        staircase(2, 7, delay=3, window=2)  # all frames fit
        with pytest.raises(ConfigError, match=r"sampler\.delay must be at least 2"):
            check_delay(1, 4, 2, setting="sampler.delay")

    def test_frames_that_are_ready_are_not_stepped(self) -> None:
        found = staircase(4, 2, delay=2, window=4, ready=1)
        assert not bool(found.update[:, 0].any())
        assert len(found.index) == 6
        assert len(staircase(4, 2, delay=2, window=4, ready=4).index) == 0


def test_a_ramp_rises_from_its_first_number() -> None:
    assert ramp(4, 0.0, 1.0, "linear") == [0.0, 0.25, 0.5, 0.75]
    cosine = ramp(4, 0.9, 1.0)
    assert cosine == pytest.approx([0.9 + 0.05 * (1 - math.cos(math.pi * c / 4)) for c in range(4)])
    with pytest.raises(ConfigError, match="Did you mean 'linear'"):
        ramp(4, 0.0, 1.0, "linar")  # type: ignore[arg-type]


class TestFusedSNR:
    def test_one_frame_is_min_snr(self) -> None:
        snr = torch.tensor([[0.5], [5.0], [20.0]])
        expected = snr.clamp(max=5.0) / (snr + 1.0)  # arXiv:2303.09556 for v
        torch.testing.assert_close(fused_snr_weights(snr), expected)

    def test_a_clean_past_counts(self) -> None:
        weights = fused_snr_weights(torch.tensor([[5.0, 0.1], [0.01, 0.1]]))
        # by hand: c = 1 after a frame of SNR 5, so that fused = 1 - 0.04 (1 - 0.02)
        fused = 1 - (1 - 0.96 * 1.0) * (1 - 0.1 / 5)
        assert float(weights[0, 1]) == pytest.approx(5 * fused / (5 * fused + 1))
        assert float(weights[1, 1]) < float(weights[0, 1])

    def test_frames_without_noise_have_no_weight(self) -> None:
        assert fused_snr_weights(torch.tensor([[torch.inf, 1.0]]))[0, 0] == 0.0
