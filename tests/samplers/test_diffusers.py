"""The schedulers of diffusers: equal to a plain loop, and refused where they are traps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import Level, on
from genscale.objectives.paths import ContinuousVP, VarianceExploding
from genscale.objectives.schedule import DiscreteVP, LinearFlow, NoiseProcess
from genscale.rng import Purpose
from genscale.samplers.diffusers_bridge import DiffusersSampler
from genscale.samplers.diffusers_tables import KINDS, Kind, Prepared, kind_of, prepare
from genscale.samplers.sde import DDIM

VP, FLOW, VE = DiscreteVP(), LinearFlow(), VarianceExploding(0.01, 40.0)

# class -> settings, eta, process: every class, and every way it predicts, draws or remembers
CASES: list[tuple[str, dict[str, Any], float, NoiseProcess]] = [
    ("DDPMScheduler", {}, 0.0, VP),
    ("DDPMScheduler", {"prediction_type": "v_prediction", "variance_type": "fixed_large"}, 0.0, VP),
    ("DDIMScheduler", {}, 0.0, VP),
    ("DDIMScheduler", {"prediction_type": "sample"}, 0.7, VP),
    ("PNDMScheduler", {}, 0.0, VP),
    ("LCMScheduler", {}, 0.0, VP),
    ("TCDScheduler", {}, 0.3, VP),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 0.0, VP),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, 0.0, FLOW),
    ("EulerAncestralDiscreteScheduler", {}, 0.0, VP),
    ("HeunDiscreteScheduler", {"prediction_type": "sample"}, 0.0, VP),
    ("KDPM2DiscreteScheduler", {}, 0.0, VP),
    ("KDPM2AncestralDiscreteScheduler", {}, 0.0, VP),
    ("LMSDiscreteScheduler", {}, 0.0, VP),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, 0.0, VP),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 0.0, FLOW),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}, 0.0, VP),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 0.0, VP),
    ("DEISMultistepScheduler", {"solver_order": 3}, 0.0, VP),
    ("UniPCMultistepScheduler", {"solver_order": 3}, 0.0, VP),
    ("UniPCMultistepScheduler", {"flow_shift": 3.0}, 0.0, FLOW),
    ("SASolverScheduler", {}, 0.0, ContinuousVP()),
    ("IPNDMScheduler", {}, 0.0, FLOW),
    ("EDMEulerScheduler", {}, 0.0, VE),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 0.0, VE),
    ("EDMDPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, 0.0, VE),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 0.0, FLOW),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, 0.0, FLOW),
    ("FlowMatchHeunDiscreteScheduler", {}, 0.0, FLOW),
]
STEPS = 8


def _plain_loop(prepared: Prepared, eta: float, model: Any, x: Tensor, draws: Any) -> Tensor:
    """Sample as a pipeline of diffusers does, with its own functions and tables."""
    import copy

    scheduler = copy.deepcopy(prepared.scheduler)
    name = type(scheduler).__name__
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    kept = getattr(module, "randn_tensor", None)
    options: dict[str, Any] = {"eta": eta} if name in ("DDIMScheduler", "TCDScheduler") else {}
    for call, timestep in enumerate(scheduler.timesteps):
        own = prepared.own.select(torch.tensor([call]))
        ours = x * float(prepared.scale[call])
        kind, config = KINDS[name].family, scheduler.config
        assert own.time is not None
        if isinstance(model.process, DiscreteVP):
            # what a network of diffusers is fed, and when: some classes round their timesteps
            fed = scheduler.scale_model_input(x, timestep)
            torch.testing.assert_close(fed, ours, atol=1e-5, rtol=1e-4)
            assert abs(float(timestep) + 1.0 - 1000.0 * float(own.time)) < 0.6
        elif kind == "flow":
            torch.testing.assert_close(x, ours)
            assert float(timestep) == pytest.approx(1000.0 * float(own.time), abs=1e-3)
        guess = model(ours, own, Conditioning())
        clean, noise = guess.clean, guess.noise
        prediction = config.get("prediction_type", "flow_prediction")
        if kind == "edm":
            # D = precondition_outputs(x, F, sigma): affine in F
            sigma = scheduler.sigmas[call]
            zero, one = (
                scheduler.precondition_outputs(x, torch.full_like(x, value), sigma)
                for value in (0.0, 1.0)
            )
            output = (clean - zero) / (one - zero)
        elif kind == "v":
            output = scheduler.alphas[call] * noise - scheduler.betas[call] * clean
        elif prediction == "sample":
            output = clean
        elif prediction == "flow_prediction":
            output = noise - clean
        elif prediction == "v_prediction":
            square = 1.0 / (1.0 + (prepared.form.sigma[call] / prepared.form.alpha[call]) ** 2)
            output = float(square.sqrt()) * noise - float((1 - square).sqrt()) * clean
        else:
            output = noise
        if kept is not None:
            module.randn_tensor = lambda *a, call=call, **k: draws(call)  # type: ignore[attr-defined]
        try:
            x = scheduler.step(output, timestep, x, return_dict=False, **options)[0]
        finally:
            if kept is not None:
                module.randn_tensor = kept  # type: ignore[attr-defined]
    return x


@pytest.mark.parametrize(
    ("name", "config", "eta", "process"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_a_class_equals_its_plain_loop(
    mixture: Any, name: str, config: dict[str, Any], eta: float, process: NoiseProcess
) -> None:
    sampler, model = DiffusersSampler(name, STEPS, config=config, eta=eta), mixture(process)
    noise = rng.normal(rng.key(1, torch.arange(6)), (2,))
    state = sampler.start(model, Conditioning(), torch.arange(6), noise)
    prepared = prepare(name, STEPS, json.dumps(config, sort_keys=True), None, process)
    ends = {int(end) - 1: step for step, end in enumerate(prepared.starts[1:])}

    def draws(call: int) -> Tensor:
        """The keyed noise of a call: the last of a step has the step's own key."""
        step = int(torch.searchsorted(prepared.starts, call, right=True)) - 1
        zero, at = torch.zeros(6).long(), torch.full((6,), step)
        back = int(prepared.starts[step + 1]) - 1 - call
        own = () if call in ends else (back,)
        return rng.normal(rng.key(torch.arange(6), zero, at, Purpose.STEP, *own), (2,))

    expected = _plain_loop(prepared, eta, model, state.x, draws)
    while int(state.step.min()) < sampler.num_steps:
        state = sampler.advance(model, state)
    torch.testing.assert_close(state.x, expected, atol=2e-5, rtol=2e-5)
    assert state.nfe.tolist() == [sampler.nfe(0, sampler.num_steps)] * 6
    assert len(prepared.scheduler.timesteps) == sampler.nfe(0, sampler.num_steps)


def test_every_class_of_the_table_is_held_to_its_loop() -> None:
    assert {name for name, *_ in CASES} == set(KINDS)
    assert all(isinstance(kind_of(name), Kind) for name in KINDS)


def test_ddim_is_ours(mixture: Any) -> None:
    ours, theirs = DDIM(10, eta=1.0), DiffusersSampler("DDIMScheduler", 10, eta=1.0)
    seeds, start = torch.arange(5), rng.normal(rng.key(1, torch.arange(5)), (2,))
    std = float(theirs.start(mixture(VP), Conditioning(), seeds[:1], torch.ones(1, 2)).x[0, 0])
    # ours begins at sigma(t_max), theirs at 1; the keys of the steps' noise are the same
    begun = ours.run(mixture(VP), Conditioning(), seeds, start)
    scale = float(VP.level(1.0).sigma) / std
    same = theirs.run(mixture(VP), Conditioning(), seeds, start * scale)
    torch.testing.assert_close(begun.x, same.x, atol=2e-5, rtol=2e-5)


def test_the_callers_noise_is_the_last_of_a_step(mixture: Any) -> None:
    model, sampler = mixture(VP), DiffusersSampler("KDPM2AncestralDiscreteScheduler", 5)
    state = sampler.evaluate(model, sampler.start(model, Conditioning(), torch.arange(3)))
    still, moved = (sampler.advance(model, state, torch.full((3, 2), v)).x for v in (0.0, 2.0))
    up = prepare(sampler.scheduler, 5, "{}", None, VP).scheduler.sigmas_up[0]
    assert float(up) > 1.0
    torch.testing.assert_close(moved - still, (2.0 * up).expand(3, 2))


@pytest.mark.parametrize(
    "name",
    [
        *("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"),
        *("LMSDiscreteScheduler", "SASolverScheduler", "DEISMultistepScheduler"),
    ],
)
def test_a_renoised_particle_begins_again(mixture: Any, name: str) -> None:
    model, sampler = mixture(VP), DiffusersSampler(name, 8)
    state = sampler.start(model, Conditioning(), torch.arange(3))
    for _ in range(5):
        state = sampler.advance(model, state)
    state = sampler.renoise(state, torch.tensor([5, 3, 5]))
    assert state.history["numbers"][1].tolist() == [0] * state.history["numbers"].shape[1]
    assert int(state.history["numbers"][0].sum()) > 0
    once = sampler.advance(model, state)
    # without a past the step is of order 1: the same as from a state that never had one
    fresh = sampler.advance(model, sampler.forget(state.select(torch.tensor([1]))))
    assert torch.equal(once.x[1:2], fresh.x)
    evaluated = sampler.evaluate(model, sampler.forget(state))
    assert evaluated.clean is not None
    assert evaluated.noise is not None
    if name != "SASolverScheduler":  # which adds noise
        place, grid = 4 + (name == "PNDMScheduler"), sampler.grid(VP)
        then = Level(grid.alpha[place : place + 1], grid.sigma[place : place + 1])
        euler = (
            on(then.alpha, state.x) * evaluated.clean + on(then.sigma, state.x) * evaluated.noise
        )
        torch.testing.assert_close(once.x[1], euler[1], atol=1e-4, rtol=1e-4)
    while int(once.step.min()) < sampler.num_steps:
        once = sampler.advance(model, once)
    assert bool(once.x.isfinite().all())


def test_torchs_own_generator_plays_no_part(mixture: Any) -> None:
    model, sampler = mixture(VP), DiffusersSampler("SASolverScheduler", 5)
    before = torch.get_rng_state()
    one = sampler.run(model, Conditioning(), torch.arange(2)).x
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(sampler.run(model, Conditioning(), torch.arange(2)).x, one)


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("UniPCMultistep", {}, r"must be one of DDPM.* Did you mean 'UniPCMultistepScheduler'\?"),
        ("DPMSolverSDEScheduler", {}, "sampler.scheduler must be one of"),
        (
            "UniPCMultistepScheduler",
            {"config": {"solver_ordr": 3}},
            r"'sampler.config.solver_ordr' .* Did you mean 'solver_order'\?",
        ),
        ("FlowMatchEulerDiscreteScheduler", {"config": {"s_churn": 1}}, "does nothing with it"),
        ("FlowMatchHeunDiscreteScheduler", {"config": {"s_churn": 1}}, "a process with alpha 1"),
        ("EulerDiscreteScheduler", {"config": {"s_churn": 1}}, "after the network .* sampler=edm"),
        ("EDMEulerScheduler", {"config": {"s_noise": 1}}, "after the network was asked"),
        ("DDIMScheduler", {"steps": 30}, r"goes down 33 .*Give steps that divide 1000"),
        ("DDPMScheduler", {"eta": 0.5}, "sampler.eta must lie in .* belongs to DDIM and TCD"),
        ("DDIMScheduler", {"eta": 1.5}, r"sampler.eta must lie in \[0, 1\]"),
        ("PNDMScheduler", {"config": {"skip_prk_steps": False}}, "whose middle cannot be left"),
        ("DEISMultistepScheduler", {"config": {"use_flow_sigmas": True}}, "with noise in the sam"),
        ("DDPMScheduler", {"config": {"variance_type": "learned_range"}}, "sampler=ancestral"),
        ("UniPCMultistepScheduler", {"config": {"solver_p": "x"}}, "a second scheduler"),
        (
            "UniPCMultistepScheduler",
            {"config": {"prediction_type": "flow_prediction"}},
            "does not go with use_flow_sigmas=false",
        ),
        (
            "EulerAncestralDiscreteScheduler",
            {"config": {"prediction_type": "sample"}},
            "refuses sampler.config=.*: prediction_type not implemented yet",
        ),
        ("DDPMScheduler", {"steps": 1001}, "could not be set up: .*cannot be larger"),
        ("DDPMScheduler", {"mu": 1.0}, "could not be set up: it takes no mu"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"config": {"use_dynamic_shifting": True}},
            "could not be set up: .*mu",
        ),
    ],
)
def test_traps_are_refused_in_a_sentence(
    name: str, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DiffusersSampler(name, settings.pop("steps", 10), **settings)


@pytest.mark.parametrize(
    ("name", "process"),
    [
        ("FlowMatchEulerDiscreteScheduler", VP),
        ("IPNDMScheduler", VE),
        ("EDMEulerScheduler", VP),
    ],
)
def test_levels_a_process_does_not_have_are_refused(name: str, process: NoiseProcess) -> None:
    (sentence,) = DiffusersSampler(name, 5).check(process, learned_variance=False)
    assert "starts at sigma / alpha = " in sentence
    assert "has levels from" in sentence


def test_dynamic_shift_takes_its_mu() -> None:
    plain, moved = (
        DiffusersSampler(
            "FlowMatchEulerDiscreteScheduler", 4, config={"use_dynamic_shifting": True}, mu=mu
        ).grid(FLOW)
        for mu in (0.0, 1.0)
    )
    # arXiv:2403.03206: sigma -> e^mu / (e^mu + 1 / sigma - 1)
    s = plain.sigma[1:-1]
    e = torch.exp(torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(moved.sigma[1:-1], e / (e + 1.0 / s - 1.0), rtol=1e-5, atol=1e-6)
