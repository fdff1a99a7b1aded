"""The tracker of moving sprites as a reward of clips."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genscale.data.sprites.dataset import MovingSprites
from genscale.errors import ConfigError, DataError
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.rewards.tracking import MEASURES_OF_TRACKS, TrackingReward

COUNT = 16


@pytest.fixture(scope="module")
def data() -> MovingSprites:
    return MovingSprites(COUNT, seed=9)


@pytest.fixture(scope="module")
def clips(data: MovingSprites) -> Tensor:
    return data.images(range(COUNT)).float() / 255.0


def judged(reward: Reward, clips: Tensor, captions: list[str]) -> RewardOutput:
    handle = reward.prepare([Request(caption=each) for each in captions])
    return reward.score(clips, handle, torch.arange(len(captions)))


def test_clips_score_one_with_their_own_captions_and_less_with_others(
    data: MovingSprites, clips: Tensor
) -> None:
    captions = list(data.captions)
    own = judged(TrackingReward(), clips, captions)
    assert own.value.tolist() == own.parts["all"].tolist() == [1.0] * COUNT
    assert own.value.dtype == torch.float32
    assert own.valid is not None
    assert own.valid.all()
    assert own.parts["objects"].tolist() == [
        len(data.captioned(row).scene.sprites) for row in range(COUNT)
    ]
    others = judged(TrackingReward(), clips, captions[1:] + captions[:1])
    assert others.value.mean() < 0.5
    backwards = judged(TrackingReward(measure="direction"), clips.flip(2), captions).value
    for row, value in enumerate(backwards.tolist()):
        # time turned round turns every direction round
        motions = [each.motion for each in data.captioned(row).requirement.objects]
        assert value == sum(each in ("still", "bouncing") for each in motions) / len(motions)


def test_the_mean_climbs_with_every_fact(clips: Tensor, data: MovingSprites) -> None:
    row = next(i for i in range(COUNT) if data.captioned(i).task == "speed")
    kind = data.captioned(row).requirement.groups[0]
    other = {"slowly": "quickly", "quickly": "slowly"}[str(kind.speed)]
    caption = data.captions[row]
    shape = "ring" if kind.kind.shape != "ring" else "cross"
    cases = {
        caption: 1.0,
        caption.replace(str(kind.speed), other): 0.8,
        caption.replace(str(kind.kind.shape), shape): 0.2,  # the number alone
    }
    values = judged(TrackingReward(), clips[[row] * 3], list(cases)).value
    assert values.tolist() == pytest.approx(list(cases.values()))


def test_what_nobody_asked_for_is_not_judged(clips: Tensor) -> None:
    reward = TrackingReward(measure="speed")
    output = judged(reward, clips[:1], ["a red circle moving up"])
    assert output.valid is not None
    assert not output.valid.any()
    assert math.isnan(float(output.parts["speed"]))
    assert "judges by the speed" in reward.problems([Request(caption="a red ring moving up")])[0]
    assert reward.problems([Request(caption="a red ring moving slowly up")]) == []


def test_pictures_are_judged_without_motion(clips: Tensor, data: MovingSprites) -> None:
    output = judged(TrackingReward(), clips[:, :, 0], list(data.captions))
    assert output.value.tolist() == [1.0] * COUNT
    assert output.parts["direction"].isnan().all()


def test_the_frame_rate_decides_speeds(clips: Tensor, data: MovingSprites) -> None:
    row = next(i for i in range(COUNT) if "slowly" in data.captions[i])
    for rate, expected in ((8.0, 1.0), (32.0, 0.0)):
        reward = TrackingReward(measure="speed", frame_rate=rate)
        assert judged(reward, clips[[row]], [data.captions[row]]).value.tolist() == [expected]


def test_what_cannot_be_judged_is_told() -> None:
    reward = TrackingReward()
    assert (reward.clips, reward.differentiable, reward.needs) == (True, False, {"caption"})
    assert reward.label == "TrackingReward(mean, 8 fps)"
    assert "judges by the caption" in reward.problems([Request()])[0]
    assert "'a dog' is no caption" in reward.problems([Request(caption="a dog")])[0]
    assert set(MEASURES_OF_TRACKS) > {"mean", "all", "steady"}
    with pytest.raises(ConfigError, match=r"reward.measure='speeds' .* Did you mean 'speed'\?"):
        TrackingReward(measure="speeds")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"reward.frame_rate=0 must be"):
        TrackingReward(frame_rate=0)
    with pytest.raises(DataError, match=r"of shape \(3, T, H, H\)"):
        judged(reward, torch.zeros(1, 1, 8, 32, 32), ["a red ring"])
    with pytest.raises(NotImplementedError, match="has no gradient"):
        reward.loss(torch.zeros(1, 3, 8, 32, 32), (), torch.zeros(1, dtype=torch.int64))
