"""What all searches that need no gradient promise: budgets kept, an answer at any time."""

from __future__ import annotations

import pytest
import torch

from genscale.search.ask_tell import AskTell
from genscale.search.base import Search
from genscale.search.best_of_n import BestOfN
from genscale.search.budget import Budget
from genscale.search.cross_entropy import CrossEntropy
from genscale.search.engine import Engine
from genscale.search.epsilon_greedy import EpsilonGreedy
from genscale.search.paths import SearchOverPaths
from genscale.search.plain import PlainSampling
from genscale.search.rollover import Rollover
from genscale.search.svdd import SVDD
from genscale.search.zero_order import ZeroOrder
from tests.search.families import world as world_of

# each as large as the budget allows
GROWN: dict[str, Search] = {
    "best of n": BestOfN(None),
    "zero order": ZeroOrder(rounds=None),
    "zero order, improve": ZeroOrder(3, rounds=None, accept="improve"),
    "paths": SearchOverPaths(width=None),
    "paths, elite": SearchOverPaths(width=None, elite=True),
    "svdd": SVDD(None),
    "svdd, beam": SVDD(None, beam=2, temperature=0.1),
    "epsilon greedy": EpsilonGreedy(rounds=None),
    "rollover": Rollover(3, quota=None),
    "cross entropy": AskTell(CrossEntropy(), rounds=None),
}
COMPETING = ["best of n", "zero order", "zero order, improve", "cross entropy"]
FAMILIES = ["dit-ddpm", "var"]


def fitting(search: Search, family: str) -> bool:
    world = world_of(family)
    return not search.problems(world.sampler)


CASES = [(name, family) for name in GROWN for family in FAMILIES if fitting(GROWN[name], family)]


@pytest.mark.parametrize(("name", "family"), CASES)
@pytest.mark.parametrize("times", [3.3, 6.9])
def test_a_budget_is_kept_and_mostly_used(name: str, family: str, times: float) -> None:
    world = world_of(family)
    # scale-wise models search steps by drawing again, which takes rewards alone
    budget = Budget(nfe=times * world.costs.total, reward_calls=int(5 * times))
    result = GROWN[name].run(world.engine(budget=budget))
    assert result.finished.all()
    shares = torch.stack(
        (result.cost.nfe / budget.nfe, result.cost.reward_calls / budget.reward_calls)
    )
    assert float(shares.max()) <= 1.0
    # on four steps one more copy of every path is a large part of it
    assert float(shares.amax(0).min()) > (0.4 if "paths" in name else 0.75)


@pytest.mark.parametrize(
    "name", ["best of n", "zero order", "zero order, improve", "cross entropy"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_plain_sample_competes_nothing_is_lost(name: str, family: str) -> None:
    world = world_of(family)
    plain = PlainSampling().run(world.engine())
    result = GROWN[name].run(world.engine(budget=Budget(nfe=3 * world.costs.total)))
    worst = (result.rewards["reward"] - plain.rewards["reward"]).min()
    assert float(worst) > -1e-5  # rounding


@pytest.mark.parametrize(("name", "family"), CASES)
def test_there_is_an_answer_when_time_is_up(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished samples where there are any, else what the particles seem to become."""
    world = world_of(family)
    ticks = iter(range(10**6))
    monkeypatch.setattr(Engine, "seconds", property(lambda _: float(next(ticks))))
    budget = Budget(nfe=20 * world.costs.total, reward_calls=100, seconds=16.0)
    result = GROWN[name].run(world.engine(budget=budget))
    assert len(result.images) == 3
    assert bool(result.images.isfinite().all())
    assert next(ticks) < 25  # it stopped


@pytest.mark.parametrize(("name", "family"), CASES)
def test_labels_tell_what_changes_results(name: str, family: str) -> None:
    label = GROWN[name].label
    assert "udget" in label
    assert GROWN[name].grows is not None
