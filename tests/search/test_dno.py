"""Direct noise optimisation: every noise of a stochastic run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genscale.errors import ConfigError
from genscale.samplers.ode import Euler, Heun
from genscale.samplers.reverse_sde import ReverseSDEHeun
from genscale.samplers.sde import DDIM
from genscale.search.budget import Budget
from genscale.search.dno import DirectNoiseOptimisation
from genscale.search.noise_regularisers import shuffles, typicality_penalty
from genscale.search.plain import PlainSampling
from tests.search.conftest import Gaussian, squash
from tests.search.families import world


@pytest.mark.parametrize("last_steps", [None, 4, 2, 9])
@pytest.mark.parametrize("sampler", [DDIM(4, eta=1.0), Heun(4, churn=1.0), ReverseSDEHeun(4)])
def test_without_steps_it_is_plain_sampling(
    engines: Any, sampler: Any, last_steps: int | None
) -> None:
    plain = PlainSampling().run(engines(sampler=sampler))
    for settings in ({"iterations": 0}, {"iterations": 2, "rate": 0.0}):
        search = DirectNoiseOptimisation(**settings, last_steps=last_steps, shuffles=2)
        result = search.run(engines(sampler=sampler))
        assert torch.equal(result.latents, plain.latents)


def test_is_the_official_loop(engines: Any) -> None:
    """One prompt, torch's own optimiser and clip, all T + 1 noises in one tensor."""
    engine = engines(prompts=1, sampler=DDIM(3, eta=1.0))
    search = DirectNoiseOptimisation(5, rate=0.1, regulariser=0.1, shuffles=3)
    found = search.run(engine).extra["loss"][0]
    sampler, model = engine.sampler, Gaussian()
    state = sampler.start(model, engine.cond, engine.seeds)
    drawn = [engine.noise(engine.seeds)]
    for _ in range(3):
        drawn.append(sampler.step_noise(model, state))
        state = sampler.advance(model, state)
    noises = torch.cat(drawn).requires_grad_()
    optimiser = torch.optim.AdamW([noises], lr=0.1)
    expected = []
    for turn in range(6):
        state = sampler.start(model, engine.cond, engine.seeds, noises[:1])
        for step in range(3):
            state = sampler.advance(model, state, noises[1 + step : 2 + step])
        loss = -(squash(state.x) * 0.5 + 0.5).mean()
        loss = loss + 0.1 * typicality_penalty(noises[None], shuffles(3, 16, turn)).sum()
        expected.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(noises, 1.0)
        optimiser.step()
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("last_steps", [None, 2])
def test_the_reward_rises(engines: Any, last_steps: int | None) -> None:
    plain = PlainSampling().run(engines())
    search = DirectNoiseOptimisation(20, rate=0.1, last_steps=last_steps, shuffles=4)
    result = search.run(engines())
    assert (result.rewards["reward"] > plain.rewards["reward"] + 0.02).all()


def test_prompts_and_micro_batches_do_not_meet(engines: Any) -> None:
    search = DirectNoiseOptimisation(8, rate=0.1, shuffles=4)
    whole, parts = (search.run(engines(prompts=3, micro_batch=size)) for size in (64, 2))
    alone = search.run(engines(prompts=1))
    torch.testing.assert_close(parts.latents, whole.latents)
    torch.testing.assert_close(alone.latents, whole.latents[:1])


class TestCounting:
    def test_all_noises(self, engines: Any) -> None:
        engine = engines()
        result = DirectNoiseOptimisation(2, shuffles=0).run(engine)
        # twice 4 there, 4 again, 4 back, and the last sample
        assert result.cost.nfe.tolist() == [20.0, 20.0]
        assert result.cost.backward_calls.tolist() == [8.0, 8.0]
        assert sum(engine.model.calls) == 40

    def test_what_comes_before_the_last_steps_is_computed_once(self, engines: Any) -> None:
        engine = engines()
        result = DirectNoiseOptimisation(3, last_steps=2, shuffles=0).run(engine)
        # 3 evaluations to stand before the noises; then 1 there, 1 again and 1 back, thrice; then 1
        assert result.cost.nfe.tolist() == [3.0 + 3 * 2 + 1] * 2
        assert result.cost.backward_calls.tolist() == [3.0, 3.0]
        assert sum(engine.model.calls) == 20

    @pytest.mark.parametrize(
        ("last_steps", "nfe", "steps"), [(None, 35, 1), (None, 36, 2), (2, 11, 1), (2, 12, 2)]
    )
    def test_budget(self, engines: Any, last_steps: int | None, nfe: int, steps: int) -> None:
        search = DirectNoiseOptimisation(None, last_steps=last_steps, shuffles=0)
        result = search.run(engines(budget=Budget(nfe=nfe)))
        assert result.extra["iterations"].tolist() == [steps] * 2
        assert (result.cost.nfe + 2 * result.cost.backward_calls <= nfe).all()


def test_a_real_network() -> None:
    tiny = world("dit-ddpm")
    plain = PlainSampling().run(tiny.engine())
    result = DirectNoiseOptimisation(5, rate=0.1, shuffles=4).run(tiny.engine())
    assert (result.rewards["reward"] > plain.rewards["reward"]).all()


def test_samplers_that_draw_nothing_and_other_models_are_refused(engines: Any) -> None:
    with pytest.raises(ConfigError, match="needs a sampler that draws noise"):
        DirectNoiseOptimisation(1).run(engines(sampler=Euler(3)))
    with pytest.raises(ConfigError, match="works on diffusion models, but the model is scale-wise"):
        DirectNoiseOptimisation(1).run(world("switti").engine())


@pytest.mark.parametrize(("name", "least"), [("last_steps", 2), ("block", 1)])
def test_impossible_settings(name: str, least: int) -> None:
    # the last step of a sampler draws nothing, so that there must be one before it
    with pytest.raises(ConfigError, match=f"search.{name} must be at least {least} and finite"):
        DirectNoiseOptimisation(**{name: least - 1})


def test_labels_tell_what_changes_results() -> None:
    assert DirectNoiseOptimisation(last_steps=3).label == (
        "DirectNoiseOptimisation(50, adam 0.01, clip 1, regulariser 1, block 4, shuffles 100, "
        "last_steps 3)"
    )
