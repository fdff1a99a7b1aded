"""D2D: the critic's formula, what stands for what, and its loop on a picture."""

from __future__ import annotations

import math

import pytest
import torch

from genscale.data.scenes.dataset import Scenes
from genscale.errors import ConfigError
from genscale.rewards.base import Request
from genscale.rewards.counting import (
    D2D,
    CountLoss,
    detector_problems,
    read_requests,
    suppress,
)
from genscale.rewards.detector import Detector
from genscale.rewards.scene_detector import SceneDetector

LEVEL = math.log(0.3 / 0.7)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


class TestCountLoss:
    """Golden numbers of the formula are in tests/golden; here is what it is for."""

    def test_too_few_raise_the_next_best(self) -> None:
        z = torch.tensor([2.0, -3.0, -1.5, -9.0], requires_grad=True)
        loss = CountLoss().loss(z, torch.tensor(3))
        expected = softplus(0.5 + LEVEL + 1.5) + softplus(0.5 + LEVEL + 3.0)
        assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)
        loss.backward()
        assert [float(g) for g in z.grad.sign()] == [0.0, -1.0, -1.0, 0.0]

    def test_too_many_lower_the_weakest(self) -> None:
        z = torch.tensor([2.0, 0.5, 1.0, -9.0], requires_grad=True)
        CountLoss().loss(z, torch.tensor(1)).backward()
        assert [float(g) for g in z.grad.sign()] == [0.0, 1.0, 1.0, 0.0]

    def test_the_right_number_keeps_its_distance(self) -> None:
        z = torch.tensor([2.0, 0.5, -4.0], requires_grad=True)
        loss = CountLoss().loss(z, torch.tensor(2))
        expected = 0.1 * (softplus(0.5 + LEVEL - 0.5) + softplus(-4.0 - LEVEL + 0.5))
        assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)
        loss.backward()
        assert [float(g) for g in z.grad.sign()] == [0.0, -1.0, 1.0]

    def test_none_asked_for(self) -> None:
        z = torch.tensor([[-4.0, -5.0], [1.0, -5.0]])
        loss = CountLoss().loss(z, torch.tensor([0, 0]))
        expected = [0.1 * softplus(-4.0 - LEVEL + 0.5), softplus(1.0 - LEVEL + 0.5)]
        assert loss.tolist() == pytest.approx(expected, abs=1e-5)

    def test_candidates_that_went_have_no_part(self) -> None:
        z = torch.tensor([3.0, 2.9, -1.0], requires_grad=True)
        kept = torch.tensor([True, False, True])
        critic = CountLoss()
        assert int(critic.count(z, kept)) == 1
        loss = critic.loss(z, torch.tensor(2), kept)
        assert float(loss.detach()) == pytest.approx(softplus(0.5 + LEVEL + 1.0), abs=1e-5)
        loss.backward()
        assert float(z.grad[1]) == 0.0
        # more wanted than there are candidates: those there are, are raised
        assert torch.isfinite(critic.loss(z, torch.tensor(9), kept))

    def test_met_is_the_right_count_with_the_margin(self) -> None:
        z = torch.tensor([[2.0, -3.0], [LEVEL + 0.4, -3.0], [2.0, 2.0]])
        assert CountLoss().met(z, torch.tensor([1, 1, 1])).tolist() == [True, False, False]


class TestSuppress:
    def test_the_best_keeps_others_off_its_place(self) -> None:
        boxes = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 1.2], [1.2, 0, 3.2, 2], [5, 5, 6, 6.0]])
        logits = torch.tensor([1.0, 3.0, 2.0, -7.0])
        # 0 and 1 share 0.6, of which 1 is better; 2 shares 0.25 or less with both
        assert suppress(logits, boxes).tolist() == [False, True, True, True]
        assert suppress(logits, boxes, overlap=0.7).tolist() == [True] * 4
        assert suppress(logits, boxes, most=1).tolist() == [False, True, False, False]

    def test_rows_are_apart(self) -> None:
        generator = torch.Generator().manual_seed(0)
        corner = torch.rand(3, 2, 30, 2, generator=generator)
        boxes = torch.cat((corner, corner + 0.3), -1)
        logits = torch.randn(3, 2, 30, generator=generator)
        whole = suppress(logits, boxes)
        for row in range(3):
            assert torch.equal(suppress(logits[row], boxes[row]), whole[row])

    def test_what_stays_does_not_overlap_and_what_goes_does(self) -> None:
        generator = torch.Generator().manual_seed(1)
        corner = torch.rand(40, 2, generator=generator)
        boxes = torch.cat((corner, corner + 0.25), 1)
        logits = torch.randn(40, generator=generator)
        kept = suppress(logits, boxes, most=40)
        low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        both = (high - low).clamp(min=0).prod(2)
        overlap = both / (2 * 0.25**2 - both)
        among = overlap[kept][:, kept] - torch.eye(int(kept.sum()))
        assert float(among.max()) <= 0.5
        for gone in (~kept).nonzero().flatten().tolist():
            better = kept & (logits > logits[gone]) & (overlap[gone] > 0.5)
            assert better.any()


class TestD2D:
    def test_scenes_have_what_they_were_asked_for(self) -> None:
        data = Scenes(20, seed=7)
        reward = D2D(SceneDetector())
        handle = reward.prepare([Request(caption=data.captions[i]) for i in range(20)])
        output = reward.score(data.images(range(20)).float() / 255.0, handle, torch.arange(20))
        assert int((output.parts["wrong"] == 0).sum()) >= 19
        right = output.parts["wrong"] == 0
        assert float(output.value[right].min()) > -1e-2
        assert output.parts["met"][right].all()

    def test_the_value_is_the_squared_error_of_the_counts(self) -> None:
        data = Scenes(1, seed=7, tasks=["colour"])
        image, kind = data.images([0]).float() / 255.0, data.captions[0].split(" ", 1)[1]
        plural = f"four {kind}{'es' if kind.endswith('s') else 's'}"
        reward = D2D(SceneDetector(), tie_break=0.0)
        handle = reward.prepare([Request(caption=plural)])
        output = reward.score(image, handle, torch.tensor([0]))
        assert output.value.tolist() == [-9.0]
        assert output.parts["wrong"].tolist() == [3.0]

    def test_excluding_others(self) -> None:
        data = Scenes(60, seed=7, tasks=["multi"])
        row = next(i for i in range(60) if data.captioned(i).scene.objects.__len__() == 3)
        image = data.images([row]).float() / 255.0
        first = data.captioned(row).scene.objects[0]
        same = [
            e
            for e in data.captioned(row).scene.objects
            if (e.colour, e.shape) == (first.colour, first.shape)
        ]
        asked = Request(caption=f"a {first.colour} {first.shape}".replace("a orange", "an orange"))
        alone, index = D2D(SceneDetector(), tie_break=0.0), torch.tensor([0])
        others = D2D(SceneDetector(), exclude=True, tie_break=0.0)
        n = len(same)
        assert alone.score(image, alone.prepare([asked]), index).value.tolist() == [
            -float((n - 1) ** 2)
        ]
        expected = -float((n - 1) ** 2 + 4)  # and three objects in place of one
        assert others.score(image, others.prepare([asked]), index).value.tolist() == [expected]

    @pytest.mark.parametrize("caption", ["three red circles", "two blue squares and a white cross"])
    def test_its_loop_makes_what_was_asked_for(self, caption: str) -> None:
        reward = D2D(SceneDetector(), exclude=True)
        handle, index = reward.prepare([Request(caption=caption)]), torch.tensor([0])
        noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        image = torch.nn.functional.avg_pool2d(0.2 + 0.4 * noise, 5, 1, 2).requires_grad_()
        optimizer = torch.optim.Adam([image], lr=0.05)
        first = reward.score(image.detach(), handle, index).parts
        assert float(first["wrong"]) >= 3.0
        best = float(first["wrong"])
        for _ in range(100):
            optimizer.zero_grad()
            reward.loss(image, handle, index).sum().backward()
            optimizer.step()
            with torch.no_grad():
                image.clamp_(0.0, 1.0)
            parts = reward.score(image.detach(), handle, index).parts
            best = min(best, float(parts["wrong"]))
            if float(parts["met"]) == 1.0:
                break
        assert best == 0.0

    def test_the_plain_loss_is_the_distance_of_the_soft_count(self) -> None:
        data = Scenes(1, seed=7, tasks=["colour"])
        image = data.images([0]).float() / 255.0
        reward = D2D(SceneDetector(), mode="plain")
        handle = reward.prepare([Request(caption=data.captions[0])])
        assert float(reward.loss(image, handle, torch.tensor([0]))) == pytest.approx(0.0, abs=1e-3)
        empty = torch.zeros(1, 3, 32, 32)
        assert float(reward.loss(empty, handle, torch.tensor([0]))) == pytest.approx(1.0, abs=1e-3)

    def test_requests_of_several_lengths(self) -> None:
        asked = read_requests(
            SceneDetector(),
            [Request(caption="a red circle"), Request(caption="a red circle and two rings")],
        )
        assert asked.classes.shape == (2, 2)
        assert asked.targets.tolist() == [[1, 0], [1, 2]]
        assert asked.of(torch.tensor([1, 0])).targets.tolist() == [[1, 2], [1, 0]]

    def test_what_cannot_be_counted_is_told(self) -> None:
        (told,) = D2D(SceneDetector()).problems([Request(caption="a crowd")])
        assert "reward D2D(SceneDetector, margin, 0.5) counts what captions name" in told
        assert "'a crowd'" in told
        assert detector_problems("R", SceneDetector(), [Request(caption="a ring")]) == []

    def test_settings_that_make_no_sense(self) -> None:
        with pytest.raises(ConfigError, match="mode='soft' is unknown"):
            D2D(SceneDetector(), mode="soft")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"threshold=1\.5 is outside 0 to 1"):
            D2D(SceneDetector(), threshold=1.5)

        class Blind(SceneDetector):
            anything = None  # type: ignore[assignment]

        with pytest.raises(ConfigError, match="exclude=true counts objects of all classes"):
            D2D(Blind(), exclude=True)
        assert issubclass(Blind, Detector)
