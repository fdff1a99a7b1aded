"""Self-forcing: rollouts are samples, gradients go where they should, two networks learn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.backbones.causal_video import CausalVideo
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import Batch
from genscale.objectives.network import NetworkView
from genscale.objectives.self_forcing import SelfForcing
from genscale.samplers.blocks import Blocks
from genscale.training.self_forcing import CRITIC, SelfForcingTraining
from genscale.training.trainable import MODEL, PictureBatch

SHAPE = (1, 4, 4, 4)


def network(seed: int = 0, num_classes: int = 0) -> CausalVideo:
    torch.manual_seed(seed)
    video = CausalVideo(
        input_size=[4, 4, 4], in_channels=1, patch_size=2, hidden_size=24, depth=1, num_heads=2,
        mlp_size=32, frequency_size=16, block_size=2, num_classes=num_classes,
    )  # fmt: skip
    with torch.no_grad():  # a fresh head says nothing
        video.head.linear.weight.normal_(std=0.2)
    return video


def batch(count: int = 3, labels: Tensor | None = None) -> Batch:
    return Batch(torch.zeros(count, *SHAPE), Conditioning(labels=labels), torch.arange(count))


def draws(count: int = 3) -> rng.StepRandom:
    return rng.for_step(5, torch.arange(count))


class TestRollout:
    def test_steps_are_moved_by_the_shift(self) -> None:
        assert SelfForcing(shift=5.0).times == pytest.approx([1.0, 0.9375, 5 / 6, 0.625])

    def test_one_step_a_block_is_the_sampler_with_one_step(self) -> None:
        video, objective = network(), SelfForcing(steps=[1000])
        found = objective.rollout(video, Conditioning(), SHAPE, draws(), 0)
        blocks = [
            rng.normal(rng.key(5, torch.arange(3), frame, 0, rng.Purpose.STEP), (1, 2, 4, 4))
            for frame in (0, 2)
        ]
        sampler = Blocks(1, block_size=2, trained_frames=4)
        state = sampler.run(
            objective.view(video), Conditioning(), torch.arange(3), torch.cat(blocks, dim=2)
        )
        torch.testing.assert_close(found, state.x)

    def test_gradients_flow_through_one_step_of_each_late_block(self) -> None:
        video = network()
        calls: list[bool] = []
        forward = video.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.append(torch.is_grad_enabled())
            return forward(*args, **kwargs)

        video.forward = watched  # type: ignore[method-assign]
        objective = SelfForcing(gradient_frames=2)
        x = objective.rollout(video, Conditioning(), SHAPE, draws(), 2)
        # three steps and the reading of block 0 without, then the third step of block 1 with
        assert calls == [False] * 4 + [False, False, True]
        assert x.requires_grad
        torch.autograd.backward(x.sum())
        assert all(p.grad is not None for p in video.blocks.parameters())

    def test_a_video_does_not_depend_on_its_batch(self) -> None:
        video, objective = network(), SelfForcing(context_noise=0.1)
        with torch.no_grad():
            whole = objective.rollout(video, Conditioning(), SHAPE, draws(), 1)
            part = objective.rollout(video, Conditioning(), SHAPE, draws(2), 1)
        torch.testing.assert_close(whole[:2], part)

    def test_the_step_of_the_gradient_is_drawn_by_optimizer_step(self) -> None:
        objective = SelfForcing()
        found = [objective.stop_step(3, step) for step in range(200)]
        assert found == [objective.stop_step(3, step) for step in range(200)]
        assert {found.count(place) > 30 for place in range(4)} == {True}


class TestLosses:
    def test_the_gradient_is_that_of_distribution_matching(self) -> None:
        """d loss / d x = (critic - teacher) / mean |x - teacher|, over the elements."""
        objective = SelfForcing(steps=[1000])
        generator, teacher, critic = network(0), network(1), network(2)
        parts: list[Tensor] = []
        rollout = objective.rollout

        def kept(*args: Any) -> Tensor:
            parts.append(rollout(*args))
            parts[-1].retain_grad()
            return parts[-1]

        objective.rollout = kept  # type: ignore[method-assign]
        out = objective.generator_loss(generator, teacher, critic, batch(), draws(), stop=0)
        torch.autograd.backward(out.loss)
        (x,) = parts
        level = objective.process.level(out.t.double())
        keys = rng.key(5, torch.arange(3), rng.Purpose.CRITIC, rng.Purpose.NOISE)
        t = out.t.view(-1, 1, 1, 1, 1)
        noisy = (1 - t) * x.detach() + t * rng.normal(keys, SHAPE)
        with torch.no_grad():
            fake, real = (
                NetworkView(net, objective.process, "velocity", "index")(
                    noisy, level, Conditioning()
                ).clean
                for net in (critic, teacher)
            )
        size = (x.detach() - real).abs().mean((1, 2, 3, 4), keepdim=True)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, (fake - real) / size / x.numel(), rtol=1e-3, atol=1e-6)
        assert all(p.grad is None for net in (teacher, critic) for p in net.parameters())

    def test_equal_judges_ask_for_nothing(self) -> None:
        objective, teacher = SelfForcing(), network(1)
        out = objective.generator_loss(network(), teacher, teacher, batch(), draws(), stop=1)
        assert float(out.loss.detach()) == 0.0

    def test_the_teacher_is_guided(self) -> None:
        labels = torch.tensor([0, 1, 2])
        teacher = network(1, num_classes=3)
        losses = [
            SelfForcing(guidance_scale=scale).generator_loss(
                network(num_classes=3), teacher, teacher, batch(labels=labels), draws(), stop=0
            )
            for scale in (1.0, 4.0)
        ]
        assert float(losses[0].loss.detach()) == 0.0
        assert float(losses[1].loss.detach()) > 0.0

    def test_the_critic_learns_alone(self) -> None:
        generator, critic = network(0), network(2)
        out = SelfForcing().critic_loss(generator, critic, batch(), draws(), stop=1)
        torch.autograd.backward(out.loss)
        assert all(p.grad is None for p in generator.parameters())
        assert any(p.grad is not None for p in critic.parameters())
        low, high = SelfForcing().time_range
        assert bool(((out.t >= low) & (out.t <= high)).all())


def test_generator_and_critic_take_turns() -> None:
    """Five optimizer steps by hand: the generator moves in one of two, the critic in each."""
    training = SelfForcingTraining(
        network(0), teacher=network(1), objective=SelfForcing(critic_steps=2), seed=3
    )
    optimizers = {
        name: torch.optim.AdamW(module.parameters(), lr=1e-3)
        for name, module in training.groups().items()
    }
    assert list(optimizers) == [MODEL, CRITIC]
    judge = copy.deepcopy(training._judge[0].state_dict())
    for step in range(5):
        before = {name: copy.deepcopy(m.state_dict()) for name, m in training.groups().items()}
        position = torch.arange(2) + 2 * step
        pictures = PictureBatch(torch.zeros(2, *SHAPE), position, step, 2)
        out = training.losses(pictures, rng.for_step(3, position))
        for name, loss in out.by_group.items():
            own = list(training.groups()[name].parameters())
            gradients = torch.autograd.grad(loss, own, allow_unused=True)
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.grad = gradient
            optimizers[name].step()
        moved = {
            name: any(not torch.equal(before[name][k], v) for k, v in m.state_dict().items())
            for name, m in training.groups().items()
        }
        assert moved == {MODEL: step % 2 == 0, CRITIC: True}
    after = training._judge[0].state_dict()
    assert all(torch.equal(judge[name], after[name]) for name in judge)
    assert not any("judge" in name for name in training.state_dict())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": [500, 750]}, r"objective\.steps must be falling"),
        ({"critic_steps": 0}, r"objective\.critic_steps must be at least 1"),
        ({"time_range": [0.5, 0.2]}, r"objective\.time_range must be"),
    ],
)
def test_what_makes_no_sense_is_told(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SelfForcing(**settings)


def test_one_network_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="trains a generator and a critic against a teacher"):
        SelfForcing().loss(network(), batch(), draws())
