"""Every reward of conf/ that needs no weights keeps the contract."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from genscale.cli.building import instantiate
from genscale.data.base import TensorImages
from genscale.data.scenes.dataset import Scenes
from genscale.rewards.base import Request, Reward

CONF = Path(__file__).resolve().parents[2] / "conf" / "reward"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "none")


def built(option: str) -> Reward:
    node = OmegaConf.load(CONF / f"{option}.yaml")
    for part in (node, *node.get("rewards", {}).values()):
        if part["_target_"].endswith(".ClassifierReward"):
            part["num_steps"] = 20  # what it learns does not matter here
    reward: Reward = instantiate(node, "reward")
    return reward


READY = [option for option in OPTIONS if not built(option).check()]
"""All others name what they lack; see the last test."""


@pytest.fixture(scope="module")
def data() -> Any:
    """Scenes of one object whose label is its shape: something for every reward to judge."""
    scenes = Scenes(120, seed=1, tasks=["colour"])
    captions = list(scenes.captions)
    words = sorted({caption.split()[-1] for caption in captions})
    labels = torch.tensor([words.index(caption.split()[-1]) for caption in captions])
    images = scenes.images(range(120))
    return SimpleNamespace(train=TensorImages(images, labels, class_names=words, captions=captions))


def prepared(option: str, data: Any) -> tuple[Reward, Any, torch.Tensor, torch.Tensor]:
    """Return a fitted reward, the handle of three requests, five pictures, their requests."""
    reward = built(option)
    if reward.learns:
        reward.fit(data)
    train = data.train
    asked = [Request(caption=train.captions[i], label=int(train.labels[i])) for i in range(3)]
    assert reward.problems(asked) == []
    images = train.images([0, 1, 2, 3, 4]).float() / 255.0
    generator = torch.Generator().manual_seed(0)
    images = (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return reward, reward.prepare(asked), images, torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("option", READY)
class TestEveryReward:
    def test_a_value_does_not_depend_on_batch_mates(self, data: Any, option: str) -> None:
        reward, handle, images, index = prepared(option, data)
        with torch.no_grad():
            whole = reward.score(images, handle, index)
            order = torch.tensor([4, 2, 0])
            some = reward.score(images[order], handle, index[order])
            for row in range(5):
                alone = reward.score(images[row : row + 1], handle, index[row : row + 1])
                torch.testing.assert_close(alone.value[0], whole.value[row], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(some.value, whole.value[order], atol=2e-4, rtol=1e-4)
        for name, part in whole.parts.items():
            torch.testing.assert_close(
                some.parts[name], part[order], atol=2e-3, rtol=1e-3, equal_nan=True
            )

    def test_values_are_finite_float32_and_parts_have_a_row_each(
        self, data: Any, option: str
    ) -> None:
        reward, handle, images, index = prepared(option, data)
        output = reward.score(images, handle, index)
        assert output.value.dtype == torch.float32
        assert output.value.shape == (5,)
        assert output.value.isfinite().all()
        assert all(part.shape == (5,) for part in output.parts.values())
        assert reward.compare(output, index).shape == (5,)

    def test_pictures_stay_as_they_were(self, data: Any, option: str) -> None:
        reward, handle, images, index = prepared(option, data)
        before = images.clone()
        reward.score(images, handle, index)
        assert torch.equal(images, before)

    def test_a_gradient_where_it_says_so(self, data: Any, option: str) -> None:
        reward, handle, images, index = prepared(option, data)
        if not reward.differentiable:
            with pytest.raises(NotImplementedError, match="has no gradient"):
                reward.loss(images, handle, index)
            return
        images.requires_grad_()
        loss = reward.loss(images, handle, index)
        assert loss.shape == (5,)
        (gradient,) = torch.autograd.grad(loss[1], images)
        assert float(gradient[1].abs().max()) > 0.0
        assert float(gradient[[0, 2, 3, 4]].abs().max()) == 0.0

    def test_requests_that_lack_what_it_needs_are_told(self, data: Any, option: str) -> None:
        reward = built(option)
        assert bool(reward.problems([Request()])) == bool(reward.needs)

    def test_two_of_a_kind_have_one_label(self, data: Any, option: str) -> None:
        assert built(option).label == built(option).label


def test_the_rewards_of_this_room_are_ready() -> None:
    ready = {
        *("scenes", "scenes_exact", "scenes_soft", "d2d", "composite"),
        *("classifier", "label_agreement", "rank"),
    }
    assert ready <= set(READY)


@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in READY])
def test_what_is_missing_is_told_in_sentences(option: str) -> None:
    assert all(each.endswith((".", '"')) and len(each) > 20 for each in built(option).check())
