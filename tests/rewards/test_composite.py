"""Several rewards as one: identities of sums, scales and ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.rewards.composite import Composite, Range, mean_ranks, zscores
from genscale.search.scorer import Scorer


class Channel(Reward):
    """The mean of one channel; smooth, or not."""

    def __init__(self, number: int, *, differentiable: bool = True) -> None:
        self.number = number
        self.differentiable = differentiable
        self.fitted = False

    @property
    def label(self) -> str:
        return f"Channel({self.number})"

    def fit(self, datamodule: Any) -> None:
        self.fitted = True

    def score(self, images: Tensor, handle: Any, index: Tensor) -> RewardOutput:
        mean = images[:, self.number].flatten(1).mean(1)
        return RewardOutput(mean, {"twice": 2 * mean})


def pictures(*rows: tuple[float, float, float]) -> Tensor:
    """Return pictures of one colour each."""
    return torch.tensor(rows)[:, :, None, None].expand(-1, -1, 2, 2)


def ordered(reward: Composite, images: Tensor, group: Tensor) -> list[float]:
    handle = reward.prepare([Request()] * (int(group.max()) + 1))
    return reward.compare(reward.score(images, handle, group), group).tolist()


IMAGES = pictures((0.1, 0.9, 0.0), (0.2, 0.5, 0.0), (0.4, 0.1, 0.0))
ONE = torch.zeros(3, dtype=torch.int64)


def two(**settings: Any) -> Composite:
    return Composite({"red": Channel(0), "green": Channel(1)}, **settings)


class TestSums:
    def test_a_weighted_sum_of_the_values(self) -> None:
        reward = two(weights={"green": 2.0})
        output = reward.score(IMAGES, reward.prepare([Request()]), ONE)
        torch.testing.assert_close(output.value, torch.tensor([1.9, 1.2, 0.6]))
        assert set(output.parts) == {"red", "red.twice", "green", "green.twice"}
        torch.testing.assert_close(output.parts["green.twice"], torch.tensor([1.8, 1.0, 0.2]))
        assert reward.potential
        assert reward.differentiable

    def test_one_reward_of_weight_one_is_that_reward(self) -> None:
        alone, reward = Channel(1), Composite({"it": Channel(1)})
        expected = alone.score(IMAGES, alone.prepare([Request()]), ONE).value
        assert torch.equal(reward.score(IMAGES, reward.prepare([Request()]), ONE).value, expected)

    def test_fixed_shift_and_scale(self) -> None:
        reward = two(normalise="affine", shift={"red": 0.1}, scale={"red": 0.1, "green": 0.5})
        output = reward.score(IMAGES, reward.prepare([Request()]), ONE)
        torch.testing.assert_close(output.value, torch.tensor([0 + 1.8, 1 + 1.0, 3 + 0.2]))
        assert reward.potential

    def test_bounds_hold_each_reward(self) -> None:
        reward = two(clip=[0.15, 0.5], weights={"red": -1.0})
        output = reward.score(IMAGES, reward.prepare([Request()]), ONE)
        torch.testing.assert_close(output.value, torch.tensor([0.5 - 0.15, 0.5 - 0.2, 0.15 - 0.4]))

    def test_the_gradient_is_that_of_the_sum(self) -> None:
        reward = two(normalise="affine", weights={"red": 3.0}, scale={"green": 0.5})
        images = IMAGES.clone().requires_grad_()
        reward.loss(images, reward.prepare([Request()]), ONE).sum().backward()
        assert images.grad is not None
        torch.testing.assert_close(images.grad[0, :, 0, 0], torch.tensor([-3 / 4, -2 / 4, 0.0]))


class TestComparisons:
    def test_ranks_are_free_of_scales(self) -> None:
        plain = ordered(two(normalise="rank"), IMAGES, ONE)
        assert plain == pytest.approx([0.5, 0.5, 0.5])  # the two disagree throughout
        uneven = ordered(two(normalise="rank", weights={"green": 3.0}), IMAGES, ONE)
        assert uneven == pytest.approx([0.75, 0.5, 0.25])
        scaled = ordered(two(normalise="rank", weights={"green": 3.0}), IMAGES**3, ONE)
        assert scaled == pytest.approx(uneven)

    def test_ranks_are_of_a_request_alone(self) -> None:
        values = torch.tensor([5.0, 1.0, 100.0, 7.0, 200.0], dtype=torch.float64)
        group = torch.tensor([0, 0, 1, 0, 1])
        assert mean_ranks(values, group).tolist() == [0.5, 0.0, 0.0, 1.0, 1.0]

    def test_equal_values_share_their_mean_rank(self) -> None:
        values = torch.tensor([2.0, 1.0, 2.0, 3.0, 2.0], dtype=torch.float64)
        one = torch.zeros(5, dtype=torch.int64)
        assert mean_ranks(values, one).tolist() == [0.5, 0.0, 0.5, 1.0, 0.5]
        assert mean_ranks(values[:1], one[:1]).tolist() == [0.5]

    def test_scores_in_deviations(self) -> None:
        values = torch.tensor([1.0, 3.0, 7.0, 7.0], dtype=torch.float64)
        group = torch.tensor([0, 0, 1, 1])
        assert zscores(values, group).tolist() == [-1.0, 1.0, 0.0, 0.0]
        # both have the same spread after it, so the weights decide
        found = ordered(two(normalise="zscore_group", weights={"red": 2.0}), IMAGES, ONE)
        assert found[2] == max(found)

    def test_the_range_grows_with_what_was_seen(self) -> None:
        reward = two(normalise="minmax_running", weights={"green": 0.0})
        handle = reward.prepare([Request(), Request()])
        first = reward.score(IMAGES, handle, ONE)
        assert reward.compare(first, ONE).tolist() == pytest.approx([0.0, 1 / 3, 1.0])
        reward.score(pictures((0.7, 0.0, 0.0)), handle, torch.tensor([0]))
        assert reward.compare(first, ONE).tolist() == pytest.approx([0.0, 1 / 6, 0.5])
        reward.score(pictures((0.9, 0.0, 0.0)), handle, torch.tensor([1]))  # another request
        assert reward.compare(first, ONE).tolist() == pytest.approx([0.0, 1 / 6, 0.5])

    def test_a_range_of_one_value(self) -> None:
        seen = Range(1)
        seen.add(torch.tensor([2.0, torch.nan]), torch.tensor([0, 0]))
        assert seen.place(torch.tensor([2.0], dtype=torch.float64), ONE[:1]).tolist() == [0.5]

    def test_candidates_without_a_number_come_last_and_do_not_count(self) -> None:
        images = torch.cat((IMAGES, pictures((torch.nan, 0.3, 0.0))))
        group = torch.zeros(4, dtype=torch.int64)
        found = ordered(two(normalise="rank", weights={"green": 3.0}), images, group)
        assert found == pytest.approx([0.75, 0.5, 0.25, -torch.inf])

    def test_through_a_search(self) -> None:
        scorer = Scorer(lambda x: 2 * x - 1, two(normalise="rank", weights={"green": 3.0}))
        scorer.prepare([Request()])
        scores = scorer.score(IMAGES, 2 * IMAGES - 1, ONE)
        assert scorer.compare(scores).tolist() == pytest.approx([0.75, 0.5, 0.25])

    @pytest.mark.parametrize("normalise", ["rank", "zscore_group", "minmax_running"])
    def test_they_are_no_potential_and_have_no_gradient(self, normalise: str) -> None:
        reward = two(normalise=normalise)
        assert not reward.potential
        assert not reward.differentiable
        with pytest.raises(NotImplementedError, match="has no gradient"):
            reward.loss(IMAGES, reward.prepare([Request()]), ONE)


class TestParts:
    def test_what_its_rewards_need_and_lack(self) -> None:
        class Needy(Channel):
            needs = frozenset({"caption"})
            licence = "MIT"
            learns = True

            def check(self) -> list[str]:
                return ["no weights"]

        needy = Needy(0, differentiable=False)
        reward = Composite({"a": needy, "b": Channel(1)})
        assert reward.needs == {"caption"}
        assert reward.check() == ["no weights"]
        assert "judges by the caption" in reward.problems([Request()])[0]
        assert reward.licence == "MIT"
        assert not reward.differentiable
        assert reward.learns
        reward.fit(SimpleNamespace())  # type: ignore[arg-type]
        assert needy.fitted
        assert reward.to("cpu") is reward

    def test_the_label_tells_weights_and_scales(self) -> None:
        assert two(weights={"red": 0.5}).label == "Composite(0.5 Channel(0) + 1 Channel(1), none)"

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"weights": {"gren": 1.0}}, r"weights names 'gren'.*Did you mean 'green'"),
            ({"normalise": "ranks"}, r"normalise='ranks' is unknown.*Did you mean 'rank'"),
            ({"shift": {"red": 1.0}}, "numbers of normalise=affine"),
            ({"normalise": "affine", "scale": {"red": 0.0}}, "must be positive"),
            ({"clip": [1.0, 0.0]}, "no pair of bounds"),
        ],
    )
    def test_settings_that_make_no_sense(self, settings: dict[str, Any], told: str) -> None:
        with pytest.raises(ConfigError, match=told):
            two(**settings)

    def test_none_at_all(self) -> None:
        with pytest.raises(ConfigError, match="one reward or more"):
            Composite({})
