"""What every sampler promises, whatever it computes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.objectives.paths import VarianceExploding
from genscale.objectives.schedule import DiscreteVP, LinearFlow, NoiseProcess
from genscale.samplers.adaptive import Adaptive
from genscale.samplers.ancestral import Ancestral
from genscale.samplers.base import Sampler, State
from genscale.samplers.churn import ChurnSampler
from genscale.samplers.diffusers_bridge import DiffusersSampler
from genscale.samplers.dpm_fast import DPMSolverFast
from genscale.samplers.grid import GridSampler
from genscale.samplers.multistep import DPMSolverMultistep
from genscale.samplers.ode import DPM2, Euler, Heun
from genscale.samplers.reverse_sde import ReverseSDE, ReverseSDEHeun
from genscale.samplers.runge_kutta import RungeKutta
from genscale.samplers.schedules import Linear
from genscale.samplers.sde import DDIM
from genscale.samplers.single_step import DPMSolver2S

SAMPLERS = {
    "euler": Euler(5),
    "euler-shift": Euler(5, shift=3.0, precision="float64"),
    "heun": Heun(4),
    "ddim": DDIM(5),
    "ddim-eta": DDIM(5, eta=0.7),
    "ddim-ancestral": DDIM(5, eta=1.0, precision="float64"),
    # 7, 8 and 9 evaluations end with steps of order 1, of order 2, and of both
    "dpm-7": DPMSolverFast(7),
    "dpm-8": DPMSolverFast(8, precision="float64"),
    "dpm-9": DPMSolverFast(9),
    "dpm-order-2": DPMSolverFast(5, order=2),
    "euler-churn": Euler(5, churn=2.0, churn_noise=1.01, precision="float64"),
    "heun-churn": Heun(4, churn=1.0, churn_max=2.0),
    "heun-midpoint": Heun(4, midpoint=0.5),
    "dpm2": DPM2(4),
    "dpm2-churn": DPM2(4, churn=1.0),
    "2m": DPMSolverMultistep(5),
    "2m-sde": DPMSolverMultistep(5, eta=1.0),
    "2m-sde-heun": DPMSolverMultistep(5, eta=0.5, correction="heun", precision="float64"),
    "3m": DPMSolverMultistep(6, order=3),
    "3m-sde": DPMSolverMultistep(6, order=3, eta=1.0),
    "2s-ancestral": DPMSolver2S(4),
    "2s": DPMSolver2S(4, eta=0.5, precision="float64"),
    "rk-euler": RungeKutta(4, method="euler"),
    "rk-heun": RungeKutta(4, schedule=Linear(end=0.1), last="full"),
    "rk-4": RungeKutta(3, method="rk4", precision="float64"),
    "rk-dopri5": RungeKutta(3, method="dopri5"),
    "ancestral-upper": Ancestral(5, variance="upper", schedule="linear"),
    "sde-sigma": ReverseSDE(5),
    "sde-tweedie": ReverseSDE(5, diffusion="sbdm", norm=0.1, last="tweedie", precision="float64"),
    "sde-euler": ReverseSDE(4, diffusion="linear", last="euler", last_size=0.1),
    "sde-grpo": ReverseSDE(5, diffusion="flow_grpo", norm=0.7, last_size=None, shift=3.0),
    "sde-heun": ReverseSDEHeun(4),
    "sde-heun-tweedie": ReverseSDEHeun(4, diffusion="increasing_decreasing", last="tweedie"),
}
PROCESSES: dict[str, NoiseProcess] = {
    "flow": LinearFlow(),
    "vp": DiscreteVP(),
    "ve": VarianceExploding(),
}
# what takes its own time: on one process each
SLOW: dict[str, tuple[GridSampler, str]] = {
    "adaptive-flow": (Adaptive(3, rtol=0.1, atol=0.01), "flow"),
    "adaptive-vp": (Adaptive(2, rtol=0.3, atol=0.1), "vp"),
    "adaptive-ve": (Adaptive(2, rtol=0.5, atol=0.5), "ve"),
    "adaptive-full": (Adaptive(2, rtol=0.2, last="full", schedule=Linear(end=0.1)), "flow"),
}
# schedulers of diffusers have levels of their own: each on a process that has them
BRIDGED: dict[str, tuple[GridSampler, str]] = {
    "ddpm": (DiffusersSampler("DDPMScheduler", 4), "vp"),
    "ddim": (DiffusersSampler("DDIMScheduler", 4, eta=0.7), "vp"),
    "pndm": (DiffusersSampler("PNDMScheduler", 5), "vp"),
    "lcm": (DiffusersSampler("LCMScheduler", 4), "vp"),
    "tcd": (DiffusersSampler("TCDScheduler", 4, eta=0.3), "vp"),
    "euler": (DiffusersSampler("EulerDiscreteScheduler", 4), "flow"),
    "euler-a": (DiffusersSampler("EulerAncestralDiscreteScheduler", 4), "vp"),
    "heun": (DiffusersSampler("HeunDiscreteScheduler", 4), "vp"),
    "kdpm2": (DiffusersSampler("KDPM2DiscreteScheduler", 4), "vp"),
    "kdpm2-a": (DiffusersSampler("KDPM2AncestralDiscreteScheduler", 4), "vp"),
    "lms": (DiffusersSampler("LMSDiscreteScheduler", 6), "vp"),
    "dpm": (DiffusersSampler("DPMSolverMultistepScheduler", 5, config={"solver_order": 3}), "vp"),
    "dpm-sde": (
        DiffusersSampler(
            "DPMSolverMultistepScheduler", 4, config={"algorithm_type": "sde-dpmsolver++"}
        ),
        "flow",
    ),
    "dpm-single": (
        DiffusersSampler(
            "DPMSolverSinglestepScheduler",
            8,
            config={"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
        ),
        "vp",
    ),
    "deis": (DiffusersSampler("DEISMultistepScheduler", 4), "vp"),
    "unipc": (DiffusersSampler("UniPCMultistepScheduler", 5, config={"solver_order": 3}), "vp"),
    "unipc-flow": (DiffusersSampler("UniPCMultistepScheduler", 4), "flow"),
    "sa": (DiffusersSampler("SASolverScheduler", 5), "vp"),
    "ipndm": (DiffusersSampler("IPNDMScheduler", 6), "flow"),
    "edm-euler": (DiffusersSampler("EDMEulerScheduler", 4), "ve"),
    "edm-dpm": (DiffusersSampler("EDMDPMSolverMultistepScheduler", 4), "ve"),
    "flow-euler": (DiffusersSampler("FlowMatchEulerDiscreteScheduler", 4), "flow"),
    "flow-heun": (DiffusersSampler("FlowMatchHeunDiscreteScheduler", 3), "flow"),
}
CASES: dict[str, tuple[GridSampler, str]] = {
    **{f"{name}-{on}": (sampler, on) for on in PROCESSES for name, sampler in SAMPLERS.items()},
    **SLOW,
    **{f"diffusers-{name}": case for name, case in BRIDGED.items()},
}
# which of them draw noise after their first step
STOCHASTIC = {
    *("ddim-eta", "ddim-ancestral", "euler-churn", "heun-churn", "dpm2-churn", "2m-sde"),
    *("2m-sde-heun", "3m-sde", "2s-ancestral", "2s", "ancestral-upper", "sde-sigma"),
    *("sde-tweedie", "sde-euler", "sde-grpo", "sde-heun", "sde-heun-tweedie"),
    *(f"diffusers-{name}" for name in ("ddpm", "ddim", "lcm", "tcd", "euler-a", "kdpm2-a")),
    *(f"diffusers-{name}" for name in ("dpm-sde", "dpm-single", "sa")),
}
COUNT = 4


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> tuple[GridSampler, str]:
    return request.param


@pytest.fixture
def sampler(case: tuple[GridSampler, str]) -> GridSampler:
    return case[0]


@pytest.fixture
def model(case: tuple[GridSampler, str], rational: Any) -> Any:
    return rational(PROCESSES[case[1]])


def _place(sampler: GridSampler, step: int) -> int:
    """Return where on the grid a step begins: some steps span several levels."""
    places = getattr(sampler, "places", None)
    return step if places is None else int(places[step])


def _start(sampler: Sampler, model: Any, rows: list[int] | None = None) -> State:
    rows = list(range(COUNT)) if rows is None else rows
    cond = Conditioning(labels=torch.tensor(rows))
    return sampler.start(model, cond, torch.tensor(rows) + 100)


def _finish(sampler: Sampler, model: Any, state: State) -> Tensor:
    while int(state.step.min()) < sampler.num_steps:
        state = sampler.advance(model, state)
    return sampler.finish(state)


def _equal(one: State, other: State) -> bool:
    names = ("x", "step", "seeds", "lineage", "group", "nfe")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_a_snapshot_continues_bit_for_bit(sampler: GridSampler, model: Any) -> None:
    state = _start(sampler, model)
    expected = sampler.run(
        model, Conditioning(labels=torch.arange(COUNT)), torch.arange(COUNT) + 100
    )
    for taken in range(sampler.num_steps):
        # evaluated or not, a state is all there is to save
        saved = sampler.evaluate(model, state) if taken % 2 else state
        file = io.BytesIO()
        torch.save(saved, file)
        restored = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        assert torch.equal(_finish(sampler, model, restored), expected.x)
        state = sampler.advance(model, state)
    assert _equal(state, expected)


@pytest.mark.parametrize("evaluated", [False, True])
def test_selected_particles_continue_bit_for_bit(
    sampler: GridSampler, model: Any, evaluated: bool
) -> None:
    whole = _finish(sampler, model, _start(sampler, model))
    state = sampler.advance(model, _start(sampler, model))
    if evaluated:
        state = sampler.evaluate(model, state)
    index = torch.tensor([2, 0, 2])
    assert torch.equal(_finish(sampler, model, state.select(index)), whole[index])


def test_a_sample_does_not_depend_on_its_batch(sampler: GridSampler, model: Any) -> None:
    whole = _finish(sampler, model, _start(sampler, model))
    for rows in ([3], [1, 0], [0, 1, 2, 3]):
        assert torch.equal(_finish(sampler, model, _start(sampler, model, rows)), whole[rows])


def test_evaluating_twice_is_evaluating_once(sampler: GridSampler, model: Any) -> None:
    state = sampler.advance(model, _start(sampler, model))
    before = len(model.calls)
    once = sampler.evaluate(model, state)
    assert sampler.evaluate(model, once) is once
    # what an adaptive step has learned where it arrived is not asked again
    assert len(model.calls) == before + (not isinstance(sampler, Adaptive))
    assert state.clean is None
    # nothing is committed: the trajectory is that of a state never looked at
    assert torch.equal(_finish(sampler, model, once), _finish(sampler, model, state))


def test_the_estimates_describe_x(sampler: GridSampler, model: Any) -> None:
    state = sampler.evaluate(model, sampler.advance(model, _start(sampler, model)))
    grid = sampler.grid(model.process)
    place = _place(sampler, 1)
    alpha, sigma = float(grid.alpha[place]), float(grid.sigma[place])
    assert state.clean is not None
    assert state.noise is not None
    torch.testing.assert_close(alpha * state.clean + sigma * state.noise, state.x)


def test_advance_leaves_nothing_evaluated(sampler: GridSampler, model: Any) -> None:
    state = sampler.advance(model, _start(sampler, model))
    assert state.clean is None
    assert state.noise is None
    assert state.pending is None
    assert state.memory is not None


def test_evaluations_are_those_announced(sampler: GridSampler, model: Any) -> None:
    state, last = _start(sampler, model), sampler.num_steps - 1
    for i in range(sampler.num_steps):
        before = len(model.calls)
        spent = state.nfe.clone()
        state = sampler.advance(model, state)
        counted = state.nfe - spent
        assert sum(model.calls[before:]) == int(counted.sum())
        if sampler.nfe_is_bound:
            assert bool(((counted > 0) | (i == last)).all())
            assert float(counted.max()) <= sampler.nfe(i, i + 1)
        else:
            assert len(model.calls) - before == sampler.nfe(i, i + 1)
            assert state.nfe.tolist() == [sampler.nfe(0, i + 1)] * COUNT
    assert sampler.nfe(0, 0) == 0
    with pytest.raises(ValueError, match="Steps 0 <= i <= j <="):
        sampler.nfe(0, sampler.num_steps + 1)


def test_particles_at_different_steps_go_together(sampler: GridSampler, model: Any) -> None:
    whole = _start(sampler, model)
    separate = _finish(sampler, model, whole)
    parts = []
    for row in range(COUNT):
        part = whole.select(torch.tensor([row]))
        for _ in range(min(row + 1, sampler.num_steps)):  # a network with memory has begun
            part = sampler.advance(model, part)
        parts.append(part)
    parts[-1] = parts[-1].replace(x=separate[-1:], step=torch.tensor([sampler.num_steps]))
    mixed = State.cat(parts)
    assert mixed.shared_step is None
    evaluated = sampler.evaluate(model, mixed)
    assert torch.equal(_finish(sampler, model, evaluated), separate)
    assert torch.equal(_finish(sampler, model, mixed), separate)


def test_finished_particles_cost_nothing_and_stay(sampler: GridSampler, model: Any) -> None:
    done = sampler.run(model, Conditioning(labels=torch.arange(COUNT)), torch.arange(COUNT) + 100)
    calls = len(model.calls)
    assert sampler.advance(model, done) is done
    assert torch.equal(sampler.evaluate(model, done).clean, done.x)
    assert len(model.calls) == calls
    almost = sampler.advance(model, _start(sampler, model))
    mixed = State.cat([done.select(torch.tensor([0])), almost.select(torch.tensor([1]))])
    calls = len(model.calls)
    after = sampler.advance(model, mixed)
    assert set(model.calls[calls:]) == {1}
    assert sampler.nfe_is_bound or len(model.calls) - calls == sampler.nfe(1, 2)
    assert torch.equal(after.x[0], done.x[0])
    assert after.nfe[0] == done.nfe[0]
    assert after.step.tolist() == [sampler.num_steps, 2]


def test_the_iterator_shows_every_step_evaluated(sampler: GridSampler, model: Any) -> None:
    states = list(sampler.steps(model, _start(sampler, model)))
    assert len(states) == sampler.num_steps + 1
    assert all(state.clean is not None for state in states[:-1])
    assert torch.equal(states[-1].x, _finish(sampler, model, _start(sampler, model)))


def test_start_noise_comes_from_the_seed_or_from_the_caller(
    sampler: GridSampler, model: Any
) -> None:
    seeds = torch.tensor([5, 6])
    own = sampler.start(model, Conditioning(), seeds)
    assert own.x.dtype == (torch.float64 if sampler.precision == "float64" else torch.float32)
    # churn is part of the start, which is then wider than sigma(t_max)
    wide = sampler.start(model, Conditioning(), seeds, noise=torch.ones(2, 2, 3)).x[0, 0, 0]
    given = sampler.start(model, Conditioning(), seeds, noise=own.x / wide)
    torch.testing.assert_close(given.x, own.x)
    # and schedulers of diffusers say themselves how wide
    if not isinstance(sampler, ChurnSampler | ReverseSDE | ReverseSDEHeun | DiffusersSampler):
        assert float(wide) == pytest.approx(float(model.process.level(1.0).sigma))
    assert not torch.equal(own.x[0], own.x[1])
    with pytest.raises(ValueError, match="2 seeds were given with 0 conditions and 3 noises"):
        sampler.start(model, Conditioning(), seeds, noise=torch.zeros(3, 2, 3))


def test_finish_wants_finished_particles(sampler: GridSampler, model: Any) -> None:
    steps = sampler.num_steps
    with pytest.raises(ValueError, match=f"A particle has {steps} of {steps} steps left"):
        sampler.finish(_start(sampler, model))


def test_gradients_flow_from_the_samples_to_the_start(sampler: GridSampler, model: Any) -> None:
    noise = torch.ones(2, 2, 3, requires_grad=True)
    state = sampler.run(model, Conditioning(), torch.arange(2), noise)
    torch.autograd.backward(state.x.sum())
    assert noise.grad is not None
    assert bool(torch.isfinite(noise.grad).all())
    assert bool((noise.grad != 0).any())


class TestRenoise:
    def test_it_is_the_forward_kernel(self, sampler: GridSampler, model: Any) -> None:
        state = sampler.advance(model, _start(sampler, model))
        if sampler.num_steps > 2:
            state = sampler.advance(model, state)
        noise = torch.linspace(-1, 1, state.x.numel()).view_as(state.x)
        back = sampler.renoise(state, 1, noise)
        i, j = _place(sampler, int(state.step[0])), _place(sampler, 1)
        grid = sampler.grid(model.process)
        ratio = grid.alpha[j] / grid.alpha[i]
        # the variance that is missing: sigma_j^2 = ratio^2 sigma_i^2 + std^2
        std = (grid.sigma[j] ** 2 - ratio**2 * grid.sigma[i] ** 2).sqrt()
        torch.testing.assert_close(back.x, float(ratio) * state.x + float(std) * noise.to(state.x))
        assert back.step.tolist() == [1] * COUNT
        assert back.nfe.tolist() == state.nfe.tolist()

    def test_keyed_noise_is_the_same_in_any_batch(self, sampler: GridSampler, model: Any) -> None:
        state = sampler.advance(model, _start(sampler, model))
        back = sampler.renoise(state, 0)
        index = torch.tensor([3, 1])
        assert torch.equal(sampler.renoise(state.select(index), 0).x, back.x[index])

    def test_going_back_again_draws_other_noise(self, sampler: GridSampler, model: Any) -> None:
        state = sampler.advance(model, _start(sampler, model))
        first = sampler.renoise(state, 0)
        # back at the same place with the same x, after having gone back once
        again = sampler.renoise(state.replace(lineage=first.lineage), 0)
        assert not torch.equal(again.x, first.x)

    def test_particles_go_where_they_are_sent(self, sampler: GridSampler, model: Any) -> None:
        state = sampler.evaluate(model, sampler.advance(model, _start(sampler, model)))
        back = sampler.renoise(state, torch.tensor([1, 0, 1, 0]))
        assert back.step.tolist() == [1, 0, 1, 0]
        assert torch.equal(back.x[0], state.x[0])
        assert (back.lineage == state.lineage).tolist() == [True, False, True, False]
        assert back.clean is None
        assert int(_finish(sampler, model, back).isfinite().all()) == 1

    def test_it_does_not_go_forward(self, sampler: GridSampler, model: Any) -> None:
        with pytest.raises(ValueError, match="renoise goes back to steps 0"):
            sampler.renoise(_start(sampler, model), 1)


@pytest.mark.parametrize("name", CASES)
def test_copies_part_by_lineage_where_there_is_noise(name: str, rational: Any) -> None:
    sampler, process = CASES[name]
    model = rational(PROCESSES[process])
    state = sampler.advance(model, _start(sampler, model, [1]))
    twins = state.select(torch.tensor([0, 0, 0])).replace(lineage=torch.tensor([7, 8, 7]))
    ended = _finish(sampler, model, twins)
    # the same lineage is the same noise, another draws its own
    assert torch.equal(ended[0], ended[2])
    parts = name in STOCHASTIC or name.removesuffix(f"-{process}") in STOCHASTIC
    assert torch.equal(ended[0], ended[1]) is not parts
    assert sampler.stochastic is parts


def test_states_of_other_processes_do_not_mix(rational: Any) -> None:
    states = []
    processes: list[NoiseProcess] = [LinearFlow(), DiscreteVP()]
    for process in processes:
        states.append(_start(Euler(3), rational(process)))
    with pytest.raises(ValueError, match="under different noising processes"):
        State.cat(states)


def test_evaluated_and_other_states_do_not_mix(rational: Any) -> None:
    sampler, model = Euler(3), rational(LinearFlow())
    state = _start(sampler, model)
    with pytest.raises(ValueError, match="some are evaluated and some are not"):
        State.cat([state, sampler.evaluate(model, state)])


def test_a_state_without_process_is_refused(rational: Any) -> None:
    sampler, model = Euler(3), rational(LinearFlow())
    with pytest.raises(ValueError, match="names no noising process"):
        sampler.evaluate(model, _start(sampler, model).replace(process=None))


def test_grids_made_where_gradients_are_off_serve_where_they_are_on(rational: Any) -> None:
    from genscale.objectives.schedule import _log_alpha_table
    from genscale.samplers.grid import level_grid

    level_grid.cache_clear()
    _log_alpha_table.cache_clear()
    sampler, model = Heun(3), rational(DiscreteVP())
    with torch.inference_mode():
        sampler.run(model, Conditioning(), torch.arange(2))
    noise = torch.ones(2, 2, 3, requires_grad=True)
    torch.autograd.backward(sampler.run(model, Conditioning(), torch.arange(2), noise).x.sum())
    assert noise.grad is not None


def test_the_default_device_is_of_no_concern(rational: Any) -> None:
    from genscale.samplers.grid import level_grid

    level_grid.cache_clear()
    with torch.device("meta"):
        samplers = [Euler(4), DPMSolverFast(4)]
        grids = [sampler.grid(DiscreteVP()) for sampler in samplers]
    assert all(grid.alpha.device.type == "cpu" for grid in grids)


def test_protocols_tell_samplers_apart() -> None:
    assert Heun(4).label == "Heun"
    assert CASES["diffusers-unipc-flow"][0].label == "UniPCMultistepScheduler"
    assert CASES["diffusers-unipc"][0].label == 'UniPCMultistepScheduler{"solver_order": 3}'


def test_every_sampler_of_the_config_is_held_to_this(repository: Path) -> None:
    tested = {f"{type(s).__module__}.{type(s).__qualname__}" for s, _ in CASES.values()}
    for file in sorted((repository / "conf" / "sampler").glob("*.yaml")):
        target = OmegaConf.load(file)._target_
        # scale-wise: test_next_scale.py; of videos: test_blocks.py
        elsewhere = str(target).endswith((".NextScale", ".Blocks"))
        assert target is None or elsewhere or target in tested, f"{file.name} names {target}"
