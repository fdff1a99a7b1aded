"""Low-resolution references: how they are reduced, and how they are corrupted."""

from __future__ import annotations

import pytest
import torch

from genscale import rng
from genscale.conditioning.low_resolution import LowResolution
from genscale.errors import ConfigError
from genscale.rng import Purpose

LOW = LowResolution(factor=2, max_level=0.5, level=0.1)


@pytest.mark.parametrize("frames", [(), (3,)], ids=["pictures", "clips"])
def test_a_pixel_is_the_mean_over_its_square(frames: tuple[int, ...]) -> None:
    images = rng.normal(rng.key(1, torch.arange(2)), (3, *frames, 4, 6))
    small = LOW.reduced(images)
    assert small.shape == (2, 3, *frames, 2, 3)
    expected = images[..., 2:4, 4:6].mean((-2, -1))
    torch.testing.assert_close(small[..., 1, 2], expected)


class TestTraining:
    def test_levels_are_uniform_and_noise_has_their_spread(self) -> None:
        images = torch.zeros(4000, 1, 8, 8)
        reference, level = LOW.of_data(images, rng.for_step(0, torch.arange(4000)))
        assert level.dtype == torch.float32
        # uniform on [0, 0.5]: mean 1/4, standard deviation 0.5 / sqrt(12)
        assert float(level.mean()) == pytest.approx(0.25, abs=0.01)
        assert float(level.std()) == pytest.approx(0.5 / 12**0.5, abs=0.005)
        assert 0.0 <= float(level.min()) < float(level.max()) <= 0.5
        unit = reference / level.view(-1, 1, 1, 1)
        assert float(unit.std()) == pytest.approx(1.0, abs=0.01)

    def test_draws_are_keyed_by_the_place_in_the_stream(self) -> None:
        images = rng.normal(rng.key(2, torch.arange(6)), (1, 4, 4))
        reference, level = LOW.of_data(images, rng.for_step(7, torch.arange(6)))
        part, own = LOW.of_data(images[2:4], rng.for_step(7, torch.tensor([2, 3])))
        assert torch.equal(reference[2:4], part)
        assert torch.equal(level[2:4], own)
        # and by nothing that other noise is keyed by
        noise = rng.for_step(7, torch.arange(6)).normal(Purpose.NOISE, (1, 2, 2))
        mine = (reference - LOW.reduced(images)) / level.view(-1, 1, 1, 1)
        assert not torch.isclose(mine, noise).any()

    def test_without_levels_references_are_clean(self) -> None:
        images = rng.normal(rng.key(3, torch.arange(2)), (1, 4, 4))
        clean = LowResolution(factor=2, max_level=0.0, level=0.0)
        reference, level = clean.of_data(images, rng.for_step(0, torch.arange(2)))
        assert torch.equal(reference, clean.reduced(images))
        assert level.tolist() == [0.0, 0.0]


class TestSampling:
    def test_the_level_is_fixed_and_noise_belongs_to_the_seed(self) -> None:
        small = 3.0 * rng.normal(rng.key(4, torch.arange(5)), (2, 3, 3))
        seeds = torch.arange(5) + 40
        reference, level = LOW.of_samples(small, seeds)
        assert level.tolist() == pytest.approx([0.1] * 5)
        again, _ = LOW.of_samples(small[3:], seeds[3:])
        assert torch.equal(reference[3:], again)
        stronger, levels = LOW.of_samples(small, seeds, 0.4)
        assert levels.tolist() == pytest.approx([0.4] * 5)
        # samples may overshoot the range of pixels, references do not
        inside = small.clamp(-1, 1)
        torch.testing.assert_close((stronger - inside) / 0.4, (reference - inside) / 0.1)

    def test_levels_of_no_training_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"reference_level must lie in \[0, 0.5\].*is 0.7"):
            LOW.of_samples(torch.zeros(1, 1, 2, 2), torch.zeros(1).long(), 0.7)


def test_impossible_numbers_are_refused() -> None:
    for factor in (0, 1.5, True):
        with pytest.raises(ConfigError, match=r"low_resolution.factor must be a whole number"):
            LowResolution(factor=factor)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"low_resolution.max_level must be finite"):
        LowResolution(max_level=-1.0)
    with pytest.raises(ConfigError, match=r"low_resolution.level must lie in \[0, 0.2\]"):
        LowResolution(max_level=0.2, level=0.3)


def test_data_that_do_not_fit_are_told() -> None:
    assert LOW.problems(3, (3, 8, 8)) == []
    (channels,) = LOW.problems(1, (3, 8, 8))
    assert "Give model.reference_channels=3" in channels
    (sides,) = LOW.problems(3, (3, 9, 8))
    assert "low_resolution.factor=2 does not divide the data's pictures of 9x8" in sides
