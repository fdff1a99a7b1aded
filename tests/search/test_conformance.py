"""Every search that conf/ names, on every family: it runs and keeps its promises, or is refused.

A new file of conf/search is tested by being there. Where :data:`APPLIES` does not name it, what
its class says of itself is believed: which families it works on, and what it needs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from genscale.cli.app import conf_directory
from genscale.cli.building import instantiate
from genscale.cli.resolvers import register_resolvers
from genscale.samplers.sde import GaussianSampler
from genscale.search.base import Search, SearchResult
from genscale.search.budget import Budget
from genscale.search.cost import BACKWARD
from tests.search.families import FAMILIES, PROMPTS, World, world

CONF = conf_directory()
SEARCHES = sorted(path.stem for path in (CONF / "search").glob("*.yaml"))
ALL = set(FAMILIES)
GRID = {"dimr-flow", "dit-ddpm"}  # whose samplers go back to higher noise levels
DIFFUSION = GRID | {"causal-video"}
NOISY = ALL - {"dimr-flow"}  # which is sampled by Euler's method: copies would stay equal
GAUSSIAN = {"dit-ddpm"}  # whose steps have a density
APPLIES: dict[str, set[str]] = {
    "none": ALL,
    "best_of_n": ALL,
    "zero_order": ALL,
    "cross_entropy": ALL,
    "epsilon_greedy": NOISY,
    "svdd": NOISY,
    "beam": NOISY,
    "rollover": NOISY,
    "fk": NOISY,
    "smc_tempered": NOISY,
    "tts_var": NOISY,
    "paths": GRID,
    "reno": DIFFUSION,
    "d2d": DIFFUSION,
    "dno": GAUSSIAN | {"causal-video"},
    "tds": GAUSSIAN,
    "das": GAUSSIAN,
}
# samples' worth of evaluations, and rewards, a prompt
SAMPLES, REWARDS = 6, 16


@cache
def build(name: str, *words: str) -> Search:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("sample", overrides=[f"search={name}", *words])
    search = instantiate(cfg.search, "search")
    assert isinstance(search, Search)
    return search


def applies(name: str, family: str) -> bool:
    if name in APPLIES:
        return family in APPLIES[name]
    search, sampler = build(name), world(family).sampler
    return (
        sampler.family in search.families
        and (sampler.stochastic or not search.needs_noise)
        and (isinstance(sampler, GaussianSampler) or not search.needs_transition)
    )


def run(search: Search, place: World, budget: Budget, micro_batch: int = 64) -> SearchResult:
    result = search.run(place.engine(budget=budget, micro_batch=micro_batch))
    keeps(result, budget)
    return result


def spent(result: SearchResult) -> Tensor:
    """Return the evaluations of each prompt, ways back included."""
    return result.cost.nfe + BACKWARD * result.cost.backward_calls


def keeps(result: SearchResult, budget: Budget) -> None:
    """Hold a result against what every search promises."""
    judged = float(result.cost.reward_calls.max())
    assert budget.nfe is None or float(spent(result).max()) <= budget.nfe + 1e-6
    assert budget.reward_calls is None or judged <= budget.reward_calls
    assert result.finished.all()
    assert result.group.tolist() == list(range(PROMPTS))
    assert bool(result.latents.isfinite().all())
    assert bool(result.images.isfinite().all())
    assert bool(result.rewards["reward"].isfinite().all())
    assert result.invalid == 0
    # what is returned is what its numbers are of
    light = (result.images * 0.5 + 0.5).clamp(0, 1).flatten(1).mean(1).double()
    torch.testing.assert_close(result.rewards["reward"], light)
    assert result.genealogy.generations
    assert set(result.genealogy.generations[-1].group.tolist()) <= set(range(PROMPTS))


def budget_of(place: World, search: Search) -> Budget:
    """Return one of a few samples, or of as much as the first answer takes."""
    nfe, rewards = search.least(place.engine())
    return Budget(nfe=max(SAMPLES * place.costs.total, nfe), reward_calls=max(REWARDS, rewards))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_runs_or_is_refused(name: str, family: str) -> None:
    search, place = build(name), world(family)
    engine = place.engine()
    problems = search.problems(place.sampler, engine.scorer.reward)
    if not applies(name, family):
        (sentence,) = problems
        assert type(search).__name__ in sentence
        assert sentence.endswith(".")
        return
    assert problems == []
    budget = budget_of(place, search)
    whole = run(search, place, budget)
    parts = run(search, place, budget, micro_batch=2)
    torch.testing.assert_close(parts.images, whole.images, atol=1e-3, rtol=0)
    torch.testing.assert_close(parts.cost.nfe, whole.cost.nfe)
    torch.testing.assert_close(parts.cost.reward_calls, whole.cost.reward_calls)
    assert torch.equal(parts.seeds, whole.seeds)
    if name != "none":  # more than sampling once; scale-wise draws again cost rewards alone
        more = spent(whole) > spent(plainly(family))
        assert bool((more | (whole.cost.reward_calls > 1)).all())


@cache
def plainly(family: str) -> SearchResult:
    return build("none").run(world(family).engine())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SEARCHES)
def test_what_one_sample_costs_buys_one_sample(name: str, family: str) -> None:
    search, place = build(name), world(family)
    if not applies(name, family):
        assert search.problems(place.sampler)
        return
    nfe, rewards = search.least(place.engine())
    result = run(search, place, Budget(nfe=nfe, reward_calls=rewards))
    if (nfe, rewards) == (place.costs.total, 1):
        torch.testing.assert_close(result.images, plainly(family).images, atol=1e-5, rtol=0)
        assert result.seeds.tolist() == place.engine().seeds.tolist()


# settings of which nothing but the plain sample can come
ALONE: dict[str, tuple[str, ...]] = {
    "best_of_n": ("search.samples=1",),
    "svdd": ("search.proposals=1",),
    "beam": ("search.proposals=1", "search.beam=1"),
    "paths": ("search.paths=1", "search.width=1", "search.forward=0"),
    "fk": ("search.particles=1",),
    "smc_tempered": ("search.particles=1",),
    "tds": ("search.particles=1", "search.strength=0"),
    "das": ("search.particles=1", "search.strength=0"),
    "tts_var": (
        "search.batch_schedule=[1]", "search.cluster_scales=[]", "search.resample_scales=[]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in SEARCHES if name in ALONE])
def test_one_particle_is_the_plain_sample(name: str, family: str) -> None:
    search, place = build(name, *ALONE[name]), world(family)
    if search.problems(place.sampler, None):
        assert not applies(name, family)
        return
    result = run(search, place, Budget())
    torch.testing.assert_close(result.images, plainly(family).images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["dit-ddpm", "var"])
@pytest.mark.parametrize("name", SEARCHES)
def test_what_grows_with_the_budget_does(name: str, family: str) -> None:
    grows = build(name).grows
    if grows is None or not applies(name, family):
        return
    search, place = build(name, f"search.{grows}=null"), world(family)
    unit = max(place.costs.total, search.least(place.engine())[0])
    judged = []
    for times in (2, 9):
        result = run(search, place, Budget(nfe=times * unit, reward_calls=10 * times))
        judged.append(float(result.cost.reward_calls.min()))
    assert judged[1] > 2 * judged[0]


def test_the_table_names_searches_and_families() -> None:
    assert set(APPLIES) | set(ALONE) <= set(SEARCHES)
    assert all(families <= ALL for families in APPLIES.values())
    assert Path(CONF).is_dir()
