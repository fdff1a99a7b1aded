"""What a search is made of beside its engine: answers, family trees, costs, the setup."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.dit import DiT
from genscale.backbones.var import VAR
from genscale.cli.searching import SearchProgress
from genscale.errors import ConfigError
from genscale.rewards.base import Request
from genscale.samplers.next_scale import NextScale
from genscale.samplers.ode import Euler
from genscale.samplers.sde import DDIM
from genscale.search.answers import Answers, Found
from genscale.search.best_of_n import BestOfN
from genscale.search.budget import Budget
from genscale.search.cost import CostMeter, state_bytes
from genscale.search.genealogy import Genealogy, Generation
from genscale.search.particles import FeynmanKac
from genscale.search.scorer import Scorer, Scores
from genscale.search.setup import SearchSetup, requests_of, work_of
from tests.search.conftest import Brightness, Gaussian


def judged(values: list[float], group: list[int]) -> tuple[Any, Scores]:
    """Return particles, numbered by their seeds, and their scores."""
    count = len(values)
    state = SimpleNamespace(seeds=torch.arange(count), lineage=torch.zeros(count).long())
    pictures = torch.zeros(count, 1, 1, 1)
    return state, Scores(
        torch.tensor(values, dtype=torch.float64), torch.tensor(group), pictures, pictures
    )


class TestAnswers:
    @pytest.fixture
    def answers(self) -> Answers:
        return Answers(2, 1, Scorer(lambda latents: latents, Brightness()))

    def test_an_estimate_stands_until_its_prompt_has_a_finished_sample(
        self, answers: Answers
    ) -> None:
        answers.offer(*judged([0.9, 0.8], [0, 1]), finished=False)
        answers.offer(*judged([0.1], [1]), finished=True)
        found = answers.found
        assert isinstance(found, Found)
        assert found.scores.group.tolist() == [0, 1]
        assert found.scores.value.tolist() == [0.9, 0.1]
        assert found.finished.tolist() == [False, True]
        assert answers.mean_best == pytest.approx(0.5)

    def test_the_best_is_kept(self, answers: Answers) -> None:
        for values in ([0.1, 0.2], [0.3, 0.1], [0.2, 0.5]):
            answers.offer(*judged(values, [0, 1]), finished=True)
        assert answers.found.scores.value.tolist() == [0.3, 0.5]

    def test_draws_stand_whatever_was_better(self, answers: Answers) -> None:
        answers.offer(*judged([0.9, 0.9], [0, 1]), finished=True)
        state, scores = judged([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1])
        answers.settle(state, scores, torch.tensor([0, 3]))
        assert answers.found.scores.value.tolist() == [0.1, 0.4]

    def test_a_prompt_without_any(self, answers: Answers) -> None:
        assert answers.mean_best is None
        answers.offer(*judged([0.5], [0]), finished=True)
        with pytest.raises(ConfigError, match="before every prompt had a sample"):
            _ = answers.found


class TestGenealogy:
    def tree(self) -> Genealogy:
        def generation(parents: list[int], group: list[int]) -> Generation:
            zeros = torch.zeros(len(group), dtype=torch.int64)
            value = torch.full((len(group),), torch.nan, dtype=torch.float64)
            seeds = torch.arange(len(group))
            place = torch.tensor(parents)
            return Generation("keep", torch.tensor(group), place, zeros, value, seeds, zeros)

        return Genealogy(
            [
                generation([-1] * 4, [0, 0, 1, 1]),
                generation([1, 1, 2, 3], [0, 0, 1, 1]),
                generation([0, 1, 3, -1], [0, 0, 1, 1]),  # the last one begins here
            ]
        )

    def test_ancestors_that_are_left(self) -> None:
        tree = self.tree()
        assert tree.alive(0).tolist() == [2, 2]
        assert tree.alive(1).tolist() == [1, 2]
        assert tree.alive().tolist() == [1, 2]

    def test_one_prompt_alone_has_numbers_of_its_own(self) -> None:
        record = self.tree().record(1)
        assert [each["parents"] for each in record] == [[-1, -1], [0, 1], [1, -1]]
        assert record[0]["reward"] == [None, None]

    def test_a_winner_leads_back_to_its_seed(self) -> None:
        assert [each["seed"] for each in self.tree().trace(2)] == [3, 3, 2]


class TestCosts:
    def test_meters_of_two_batches_join(self) -> None:
        one, two = CostMeter(2), CostMeter(1)
        one.add("nfe", torch.tensor([0, 1, 1]), 2.0)
        two.add("nfe", torch.tensor([0]), torch.tensor([5.0]))
        one.add_seconds("network", 1.0)
        two.add_seconds("network", 2.0)
        whole = CostMeter.cat([one, two])
        assert whole.nfe.tolist() == [2.0, 4.0, 5.0]
        assert whole.record()["nfe"] == pytest.approx(11 / 3)
        assert whole.record()["seconds_network"] == 3.0
        assert whole.row(1)["nfe"] == 4.0

    def test_bytes_of_a_particle(self, engines: Any) -> None:
        engine = engines(prompts=2)
        state = engine.start(3)
        assert state_bytes(state) == 16.0  # four float32 numbers
        assert state_bytes(engine.evaluate(state)) == 48.0  # and the two estimates

    def test_work_of_a_diffusion_model_is_the_same_at_every_step(self) -> None:
        model = DiT(
            input_size=8, in_channels=1, patch_size=2, hidden_size=16, depth=1, num_heads=2,
            num_classes=0,
        )  # fmt: skip
        work = work_of(model, Euler(3))
        assert work.flops.tolist() == [float(model.flops())] * 3
        assert work.tokens.tolist() == [16.0] * 3
        weights = sum(p.numel() for p in model.parameters())
        assert work.weight_bytes == 4.0 * weights
        assert work_of(model, Euler(3), precision="bfloat16").weight_bytes == 2.0 * weights

    def test_work_of_a_scale_wise_model_goes_with_its_tokens(self) -> None:
        model = VAR(
            scales=[1, 2, 4], vocab_size=8, latent_channels=4, hidden_size=16, depth=1,
            num_heads=2, num_classes=0,
        )  # fmt: skip
        work = work_of(model, NextScale(3))
        assert work.tokens.tolist() == [1.0, 4.0, 16.0]
        torch.testing.assert_close(work.flops.sum().item(), float(model.flops()))

    def test_effective_operations_pay_for_the_weights_once_a_call(self, engines: Any) -> None:
        """eFLOPs = B F + I (W + B A): one call of eight rows beside eight calls of one."""
        from genscale.search.cost import Work

        flops = torch.full((4,), 10.0, dtype=torch.float64)
        work = Work(flops, torch.ones(4, dtype=torch.float64), weight_bytes=1000.0, intensity=2.0)
        together = BestOfN(8).run(engines(prompts=1, work=work))
        apart = BestOfN(8).run(engines(prompts=1, work=work, micro_batch=1))
        assert together.cost.flops.tolist() == apart.cost.flops.tolist() == [8 * 4 * 10.0]
        # four calls, or 32, read the weights
        extra = float(apart.cost.eflops[0] - together.cost.eflops[0])
        assert extra == pytest.approx(2.0 * 1000.0 * (32 - 4))


class TestSetup:
    def setup_of(self, **changes: Any) -> SearchSetup:
        return SearchSetup(**({"search": BestOfN(3), "reward": Brightness()} | changes))

    def test_the_label_says_what_changes_results(self) -> None:
        plain = self.setup_of()
        limited = self.setup_of(budget=Budget(nfe=40, seconds=2))
        assert plain.label == "BestOfN(3), reward Brightness"
        assert limited.label == "BestOfN(3), reward Brightness, budget nfe 40 seconds 2"

    def test_problems_of_search_and_rewards_come_together(self) -> None:
        class Captioned(Brightness):
            needs = frozenset({"caption"})

        setup = self.setup_of(search=FeynmanKac(), held_out={"told": Captioned()})
        first, second = setup.problems(DDIM(4), [Request()])
        assert "draws noise" in first
        assert "judges by the caption" in second

    def test_requests(self) -> None:
        asked = requests_of(["a", "b"], torch.tensor([3, 4]), 2)
        assert asked == [Request("a", 3), Request("b", 4)]
        assert requests_of(None, None, 1) == [Request()]

    def test_held_out_rewards_see_the_answers_alone(self) -> None:
        seen: list[int] = []

        class Counting(Brightness):
            def score(self, images: Tensor, handle: Any, index: Tensor) -> Any:
                seen.append(len(images))
                return super().score(images, handle, index)

        from genscale.conditioning.base import Conditioning
        from genscale.guidance.base import Unguided

        setup = self.setup_of(held_out={"counting": Counting()})
        seeds = torch.arange(2)
        asked = requests_of(None, None, 2)
        setup.run(
            DDIM(4, eta=1.0), Gaussian(), Unguided(), torch.tanh, Conditioning(), seeds,
            requests=asked,
        )  # fmt: skip
        assert seen == [2]


def test_progress_tells_what_was_spent_and_what_is_left(
    engines: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genscale.cli.searching._EVERY", 0.0)
    with SearchProgress(2) as shown:
        engine = engines(budget=Budget(nfe=40, seconds=1000), watch=shown)
        BestOfN(3).run(engine)
        shown.finished(2)
    lines = capsys.readouterr().err.splitlines()
    assert "0 of 2 prompts done, 12 of 40 evaluations, best reward" in lines[-1]
    assert "s left" in lines[-1]
