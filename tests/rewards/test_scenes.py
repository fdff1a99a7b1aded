"""Rewards of scenes: the oracle, and its differentiable stand-in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genscale.data.scenes.dataset import Scenes
from genscale.data.scenes.grammar import Scene, SceneObject
from genscale.data.scenes.renderer import render
from genscale.errors import ConfigError, DataError
from genscale.rewards.base import Request, Reward
from genscale.rewards.scenes import MEASURES_OF_SCENES, SceneOracle, requirements, scene_problems
from genscale.rewards.scenes_soft import SceneSoft


def drawn(*objects: SceneObject) -> Tensor:
    """Return a picture ``(1, 3, 32, 32)`` in [0, 1] of objects on navy."""
    return torch.from_numpy(render(Scene("navy", objects), 32))[None].float() / 255.0


def judged(reward: Reward, images: Tensor, *captions: str) -> tuple[Tensor, dict[str, Tensor]]:
    handle = reward.prepare([Request(caption=each) for each in captions])
    output = reward.score(images, handle, torch.arange(len(captions)))
    return output.value, output.parts


TWO = (SceneObject("circle", "red", 0.25, 0.3, 0.3), SceneObject("square", "blue", 0.7, 0.6, 0.3))


class TestOracle:
    def test_rendered_scenes_show_what_their_captions_say(self) -> None:
        data = Scenes(40, seed=5)
        captions = [data.captions[i] for i in range(40)]
        value, parts = judged(SceneOracle(), data.images(range(40)).float() / 255.0, *captions)
        assert value.tolist() == parts["all"].tolist() == [1.0] * 40
        assert parts["objects"].tolist() == [
            data.captioned(i).scene.objects.__len__() for i in range(40)
        ]

    @pytest.mark.parametrize(
        ("measure", "expected"),
        [
            # two objects for three asked for; one of those three is there, and another circle is
            # none; no relation is asked for
            ("all", 0.0),
            ("mean", (0.0 + 1 / 3 + 1 / 3) / 3),
            ("count_exact", 0.0),
            ("count_soft", math.exp(-1)),
            ("count_neg_sq", -1.0),
            ("colour", 1 / 3),
            ("shape", 1 / 3),
        ],
    )
    def test_what_each_measure_says(self, measure: str, expected: float) -> None:
        value, _ = judged(SceneOracle(measure=measure), drawn(*TWO), "three red circles")
        assert float(value) == pytest.approx(expected)

    def test_a_relation(self) -> None:
        reward, image = SceneOracle(measure="relation"), drawn(*TWO)
        assert float(judged(reward, image, "a red circle left of a blue square")[0]) == 1.0
        assert float(judged(reward, image, "a red circle right of a blue square")[0]) == 0.0

    def test_what_a_caption_does_not_ask_for_is_nan(self) -> None:
        _, parts = judged(SceneOracle(), drawn(*TWO), "a circle and a square")
        assert parts["colour"].isnan().all()
        assert parts["relation"].isnan().all()
        assert parts["shape"].tolist() == [1.0]

    def test_a_shift_by_one_pixel_changes_nothing(self) -> None:
        data = Scenes(12, seed=8)
        images = data.images(range(12)).float() / 255.0
        captions = [data.captions[i] for i in range(12)]
        for shift in ((1, 0), (0, 1), (-1, -1)):  # objects keep one pixel from the edge
            moved = torch.roll(images, shift, (2, 3))
            assert judged(SceneOracle(), moved, *captions)[0].tolist() == [1.0] * 12

    def test_captions_that_are_none_are_told(self) -> None:
        found = SceneOracle().problems(
            [Request(caption="two red circles"), Request(caption="a cat")]
        )
        assert len(found) == 1
        assert "SceneOracle(mean)" in found[0]
        assert "'a cat' is no caption of a scene" in found[0]
        assert "judges by the caption" in SceneOracle().problems([Request()])[0]

    def test_a_measure_that_no_caption_asks_for_is_told(self) -> None:
        asked = [Request(caption="two red circles")]
        (told,) = scene_problems("R", asked, "relation")
        assert "relation that a caption names, but 'two red circles' names none" in told
        assert SceneOracle(measure="relation").problems(asked) != []
        assert SceneOracle(measure="colour").problems(asked) == []
        output = SceneOracle(measure="relation").score(
            drawn(*TWO), requirements(asked), torch.tensor([0])
        )
        assert output.valid is not None
        assert output.valid.tolist() == [False]

    def test_an_unknown_measure(self) -> None:
        with pytest.raises(ConfigError, match=r"measure='count' is no measure.*Did you mean"):
            SceneOracle(measure="count")  # type: ignore[arg-type]
        assert len(MEASURES_OF_SCENES) == 8

    def test_pictures_without_colour(self) -> None:
        with pytest.raises(DataError, match=r"shape \(3, H, W\)"):
            judged(SceneOracle(), torch.zeros(1, 1, 32, 32), "a circle")


class TestSoft:
    def test_it_is_nearly_one_where_the_oracle_is(self) -> None:
        data = Scenes(24, seed=6)
        captions = [data.captions[i] for i in range(24)]
        value, parts = judged(SceneSoft(), data.images(range(24)).float() / 255.0, *captions)
        assert float(value.min()) > 0.8
        assert float(parts["count"].min()) > 0.8
        assert float(parts["found"].min()) > 0.8

    def test_the_relation_counts(self) -> None:
        image = drawn(*TWO)
        right, said = judged(SceneSoft(), image, "a red circle left of a blue square")
        wrong, denied = judged(SceneSoft(), image, "a red circle right of a blue square")
        assert float(said["relation"]) > 0.8
        assert float(denied["relation"]) < 0.01
        # a third of the value, and counts and shapes are as asked in both
        assert float(right - wrong) == pytest.approx(
            float(said["relation"] - denied["relation"]) / 3, abs=1e-5
        )

    def test_objects_that_nobody_asked_for_cost(self) -> None:
        one, _ = judged(SceneSoft(), drawn(TWO[0]), "a red circle")
        two, parts = judged(SceneSoft(), drawn(*TWO), "a red circle")
        assert float(parts["count"]) == pytest.approx(math.exp(-1), abs=0.02)
        assert float(one) > 0.9 > float(two)

    def test_its_gradient_makes_what_was_asked_for(self) -> None:
        reward = SceneSoft()
        handle = reward.prepare([Request(caption="two red circles")])
        index = torch.tensor([0])
        image = torch.full((1, 3, 32, 32), 0.3).requires_grad_()
        before = float(reward.score(image.detach(), handle, index).value)
        optimizer = torch.optim.Adam([image], lr=0.05)
        for _ in range(40):
            optimizer.zero_grad()
            reward.loss(image.clamp(0, 1), handle, index).sum().backward()
            optimizer.step()
        after = reward.score(image.detach().clamp(0, 1), handle, index)
        assert before < 0.0
        assert float(after.value) > 0.8
        assert float(after.parts["found"]) > 0.7
