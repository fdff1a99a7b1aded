"""Power-function averages: their closed form, and others put together from snapshots."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from genscale.errors import CheckpointError, ConfigError
from genscale.io.weights import read_checkpoint
from genscale.training.ema import PowerEMA
from genscale.training.posthoc import (
    Combination,
    Profile,
    choose_snapshots,
    combine,
    drop_later,
    find_snapshots,
    inner_products,
    reconstruct,
    save_average,
    save_snapshot,
)

STORED = (0.05, 0.10)


def stored(steps: int, every: int) -> list[Profile]:
    return [Profile(step, width) for step in range(every, steps + 1, every) for width in STORED]


class Walk:
    """Weights on a random walk, and averages of them tracked step by step in float64."""

    def __init__(self, steps: int, widths: tuple[float, ...], dim: int = 64) -> None:
        draws = torch.randn(steps, dim, generator=torch.Generator().manual_seed(0)).double()
        path = draws.cumsum(0)
        model = nn.Linear(dim, 1, bias=False, dtype=torch.float64)
        laws = [PowerEMA(sigma_rel=width) for width in widths]
        averages = [copy.deepcopy(model) for _ in laws]
        self.at: dict[Profile, Tensor] = {}
        for step in range(1, steps + 1):
            model.weight.data.copy_(path[step - 1])
            for law, average in zip(laws, averages, strict=True):
                law.update(average, model, step)
                self.at[Profile(step, law.sigma_rel)] = average.weight.data[0].clone()
        self.path = path

    def error(self, wanted: Profile, every: int) -> float:
        """Distance of the reconstruction from the tracked average, as a share of its spread."""
        profiles = stored(wanted.step, every)
        weights = combine(profiles, wanted).coefficients
        rebuilt = weights @ torch.stack([self.at[profile] for profile in profiles])
        tracked = self.at[wanted]
        # against how far the weights moved within the average's length, not from the origin
        return float((rebuilt - tracked).norm() / (self.path[-1] - tracked).norm())


@pytest.fixture(scope="module")
def walk() -> Walk:
    return Walk(480, (0.03, 0.05, 0.08, 0.10, 0.15, 0.20))


class TestProfiles:
    @pytest.mark.parametrize("width", [0.03, 0.05, 0.1, 0.25])
    def test_a_tracked_average_is_the_integral_of_its_profile(self, width: float) -> None:
        law, steps = PowerEMA(sigma_rel=width), 40
        shares = torch.zeros(steps, dtype=torch.float64)
        for step in range(1, steps + 1):
            shares *= law.decay_at(step)
            shares[step - 1] += 1 - law.decay_at(step)
        edges = torch.arange(steps + 1, dtype=torch.float64) / steps
        torch.testing.assert_close(shares, (edges ** (law.gamma + 1)).diff(), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("width", [0.03, 0.05, 0.1, 0.25])
    def test_the_width_is_the_standard_deviation_of_the_profile(self, width: float) -> None:
        gamma = PowerEMA(sigma_rel=width).gamma
        # moments of p(t) = (g + 1) t^g on [0, 1]
        mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
        assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=1e-9)

    def test_inner_products_are_the_integrals(self) -> None:
        profiles = [Profile(30, 0.1), Profile(70, 0.05), Profile(70, 0.2), Profile(100, 0.03)]
        time = (torch.arange(200_000, dtype=torch.float64) + 0.5) * (100 / 200_000)
        values = torch.stack(
            [
                torch.where(time < p.step, (p.gamma + 1) / p.step * (time / p.step) ** p.gamma, 0.0)
                for p in profiles
            ]
        )
        expected = values @ values.T * (100 / 200_000)
        torch.testing.assert_close(inner_products(profiles, profiles), expected, rtol=1e-5, atol=0)

    def test_long_exponents_do_not_overflow(self) -> None:
        profiles = [Profile(step, 0.0005) for step in (10, 10**6, 10**7)]  # g is about 2000
        gram = inner_products(profiles, profiles)
        assert bool(torch.isfinite(gram).all())
        assert gram[0, 2] == 0.0  # 10^-6 to the power 2000 is nothing
        # of one profile: (g + 1)^2 / (2 g + 1) / t
        gamma = profiles[0].gamma
        assert float(gram[0, 0]) == pytest.approx((gamma + 1) ** 2 / (2 * gamma + 1) / 10)


class TestCombination:
    @pytest.mark.parametrize("width", STORED)
    @pytest.mark.parametrize("step", [100, 400])
    def test_a_stored_profile_is_given_back(self, width: float, step: int) -> None:
        profiles = stored(400, 20)
        found = combine(profiles, Profile(step, width))
        expected = torch.zeros(len(profiles), dtype=torch.float64)
        expected[profiles.index(Profile(step, width))] = 1.0
        torch.testing.assert_close(found.coefficients, expected, rtol=0, atol=1e-9)
        assert found.residual < 1e-6

    @pytest.mark.parametrize("width", [0.02, 0.03, 0.08, 0.15, 0.25])
    def test_weights_that_never_moved_come_back(self, width: float) -> None:
        for every in (10, 50, 400):
            found = combine(stored(400, every), Profile(400, width))
            assert float(found.coefficients.sum()) == pytest.approx(1.0, abs=1e-12)

    def test_the_projection_leaves_nothing_along_the_stored_profiles(self) -> None:
        profiles, wanted = stored(400, 10), Profile(400, 0.08)
        found = combine(profiles, wanted)
        left = inner_products(profiles, profiles) @ found.coefficients
        right = inner_products(profiles, [wanted])[:, 0]
        # exactly 0 but for the division by the sum of the coefficients, 1 - 1e-6 here
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("width", [0.03, 0.08, 0.15, 0.20])
    def test_more_snapshots_come_closer(self, walk: Walk, width: float) -> None:
        wanted = Profile(480, width)
        residuals = [combine(stored(480, every), wanted).residual for every in (60, 20, 5)]
        errors = [walk.error(wanted, every) for every in (60, 20, 5)]
        assert residuals[0] > 3 * residuals[1] > 9 * residuals[2]
        assert errors[0] > 3 * errors[1] > 9 * errors[2]
        # 8, 24 and 96 snapshots of each profile
        assert errors[0] < 0.15
        assert errors[1] < 0.02
        assert errors[2] < 0.001

    def test_any_stored_step_can_be_the_end(self, walk: Walk) -> None:
        assert walk.error(Profile(240, 0.08), 20) < 0.02


class Network(nn.Module):
    """Parameters, a constant buffer, and a count."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 3), value))
        self.register_buffer("grid", torch.full((2,), 1 / 3))
        self.register_buffer("count", torch.tensor(int(value)))


class TestFiles:
    def fill(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        for step in (10, 20, 30):
            for width in STORED:
                profile = Profile(step, width)
                save_snapshot(Network(step + width), profile, folder, dtype=dtype)

    def test_snapshots_are_found_by_profile(self, tmp_path: Path) -> None:
        self.fill(tmp_path)
        (tmp_path / "ema_0.05_step-00000030.safetensors.txt").touch()
        found = find_snapshots(tmp_path)
        assert list(found) == [Profile(step, width) for step in (10, 20, 30) for width in STORED]
        assert found[Profile(20, 0.1)].name == "ema_0.1_step-00000020.safetensors"
        used, wanted = choose_snapshots(tmp_path, [0.07, 0.2], 20)
        assert list(used) == list(found)[:4]
        assert wanted == [Profile(20, 0.07), Profile(20, 0.2)]
        assert choose_snapshots(tmp_path, [0.07], None)[1] == [Profile(30, 0.07)]

    def test_what_a_resumed_run_makes_again_is_dropped(self, tmp_path: Path) -> None:
        self.fill(tmp_path)
        (tmp_path / ".ema_0.05.0123.safetensors").touch()  # left by a kill while it was written
        assert len(drop_later(tmp_path, 15)) == 4
        assert {profile.step for profile in find_snapshots(tmp_path)} == {10}
        assert len(list(tmp_path.iterdir())) == 2

    def test_parameters_are_added_up_and_buffers_copied(self, tmp_path: Path) -> None:
        self.fill(tmp_path)
        coefficients = torch.tensor([0.5, 0, 0, -1.5, 0, 2.0], dtype=torch.float64)
        (state,) = reconstruct(find_snapshots(tmp_path), [Combination(coefficients, 0.0)])
        expected = 0.5 * 10.05 - 1.5 * 20.1 + 2 * 30.1
        torch.testing.assert_close(state["weight"], torch.full((2, 3), expected))
        assert torch.equal(state["grid"], torch.full((2,), 1 / 3))  # to the bit
        assert int(state["count"]) == 30
        assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}

    def test_half_precision_halves_parameters_alone(self, tmp_path: Path) -> None:
        self.fill(tmp_path, torch.float16)
        state = read_checkpoint(find_snapshots(tmp_path)[Profile(10, 0.05)])
        assert state["weight"].dtype == torch.float16
        assert state["grid"].dtype == torch.float32
        assert state["weight"][0, 0].item() == pytest.approx(10.05, rel=2**-11)

    def test_another_process_writes_nothing(self, tmp_path: Path) -> None:
        kind = torch.float32
        save_snapshot(Network(1.0), Profile(1, 0.05), tmp_path, dtype=kind, write=False)
        assert list(tmp_path.iterdir()) == []

    def test_an_average_says_what_it_is(self, tmp_path: Path) -> None:
        path = tmp_path / "averages" / "posthoc_0.08.safetensors"
        made_of = Combination(torch.ones(4, dtype=torch.float64) / 4, 0.0123)
        save_average({"x": torch.ones(2)}, path, profile=Profile(30, 0.08), combination=made_of)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {
                "sigma_rel": "0.08",
                "step": "30",
                "snapshots": "4",
                "residual": "0.0123",
            }

    def test_what_cannot_be_used_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"No snapshots of averages .* ema=posthoc"):
            choose_snapshots(tmp_path, [0.05], None)
        self.fill(tmp_path)
        with pytest.raises(ConfigError, match=r"sigma_rel must lie in \(0, 0.28\), but 0.3"):
            choose_snapshots(tmp_path, [0.3], None)
        with pytest.raises(CheckpointError, match=r"No snapshots of step 15 .* steps 10, 20, 30"):
            choose_snapshots(tmp_path, [0.05], 15)
        snapshots, wanted = choose_snapshots(tmp_path, [0.08], None)
        found = [combine(list(snapshots), wanted[0])]
        first = next(iter(snapshots.values()))
        save_snapshot(nn.Linear(2, 2), Profile(10, 0.05), tmp_path, dtype=torch.float32)
        with pytest.raises(CheckpointError, match="holds other tensors than"):
            reconstruct(snapshots, found)
        first.write_bytes(first.read_bytes()[:50])
        with pytest.raises(CheckpointError, match="is damaged or no snapshot"):
            reconstruct(snapshots, found)

    def test_the_copied_names_are_stored(self, tmp_path: Path) -> None:
        save_snapshot(Network(1.0), Profile(1, 0.05), tmp_path, dtype=torch.float32)
        with safe_open(tmp_path / Profile(1, 0.05).file_name, "pt") as file:
            assert json.loads(file.metadata()["copied"]) == ["grid", "count"]
