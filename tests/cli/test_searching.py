"""Searches from the command line: what is refused, what is written, and that nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from genscale.cli.scaling_results import mean_and_half, summarise

PROMPTS = 'prompts=["two red circles","a blue square"]'
FOUND = ("search=best_of_n", "reward=scenes", "held_out=scenes_exact")


@pytest.fixture
def run(text_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_run, tmp_path / "run"))


class TestSampling:
    def test_numbers_pictures_and_report(self, command: Any, run: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        words = (f"run={run}", "num_samples=4", PROMPTS, "search.samples=3", f"out_dir={out}")
        answer = command("sample", *words, *FOUND)
        assert answer.status == 0, answer.err
        record = json.loads((out / "search.json").read_text())
        assert [each["id"] for each in record["samples"]] == [0, 1, 2, 3]
        assert {each["prompt"] for each in record["samples"]} == {
            "two red circles",
            "a blue square",
        }
        # three samples of two steps, each with a guidance of two branches
        assert record["cost"]["nfe"] == 3 * record["plain_nfe"] == 12.0
        assert record["cost"]["decodes"] == record["cost"]["reward_calls"] == 3.0
        for before, after in zip(record["samples_before"], record["samples"], strict=True):
            assert after["rewards"]["reward"] >= before["rewards"]["reward"]
        assert record["means"]["held_out"]
        for name in ("grid.png", "before.png", "search.html"):
            assert (out / name).is_file()
        page = (out / "search.html").read_text()
        assert page.count("<img") == 2
        assert "held out" in page
        assert "without search" in answer.out

    def test_one_sample_is_the_plain_one(self, command: Any, run: Path, tmp_path: Path) -> None:
        words = (f"run={run}", "num_samples=3", PROMPTS)
        assert command("sample", *words, f"out_dir={tmp_path / 'plain'}").status == 0
        one = (*FOUND, "search.samples=1", f"out_dir={tmp_path / 'one'}", "compare=false")
        assert command("sample", *words, *one).status == 0
        plain, one_of = (tmp_path / name / "grid.png" for name in ("plain", "one"))
        assert plain.read_bytes() == one_of.read_bytes()

    def test_a_reward_without_search_judges_plain_samples(
        self, command: Any, run: Path, tmp_path: Path
    ) -> None:
        words = (
            f"run={run}",
            "num_samples=2",
            PROMPTS,
            "reward=scenes",
            f"out_dir={tmp_path / 'o'}",
        )
        answer = command("sample", *words, "compare=false")
        assert answer.status == 0, answer.err
        assert json.loads((tmp_path / "o/search.json").read_text())["cost"]["nfe"] == 4.0

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["search=best_of_n"], "needs something to search for, but no reward was given"),
            (["budget.nfe=100"], "a budget was given, but nothing is searched for"),
            (["held_out=scenes"], "held_out was given, but nothing is searched for"),
            (["search=best_of_n", "reward=scenes"], "nothing else would tell whether"),
            (
                ["search=best_of_n", "reward=scenes", "held_out=scenes"],
                "so that a search would be judged by what it followed",
            ),
            ([*FOUND, "budget.nfe=1"], "budget.nfe=1 is smaller than the 4 that one sample takes"),
            ([*FOUND, "budget.nfe=-1"], "budget.nfe must be positive, but is -1"),
            ([*FOUND, "micro_batch=0"], "micro_batch must be a whole number of at least 1"),
            ([*FOUND, "search=best_off_n"], "best_of_n"),
            ([*FOUND, "reward=scene"], "Did you mean"),
            ([*FOUND, "prompts=a horse"], "a horse"),
        ],
    )
    def test_mistakes(
        self, command: Any, text_run: Path, tmp_path: Path, words: list[str], sentence: str
    ) -> None:
        answer = command(
            "sample", f"run={text_run}", "num_samples=2", f"out_dir={tmp_path / 'o'}", *words
        )
        assert answer.status == 1
        assert sentence in answer.err
        assert "Traceback" not in answer.err


def test_evaluation_counts_what_the_search_spent(command: Any, run: Path) -> None:
    words = (f"run={run}", "num_samples=6", "metrics=scenes", "search.samples=2")
    answer = command("evaluate", *words, *FOUND)
    assert answer.status == 0, answer.err
    (file,) = (run / "evaluations").glob("*/metrics.json")
    record = json.loads(file.read_text())
    assert record["nfe_per_sample"] == 8.0
    assert record["search_cost"]["nfe"] == 8.0
    assert record["held_out_rewards"]
    protocols = record["protocols"].values()
    assert all("BestOfN(2)" in each["sampler"] for each in protocols if each["sampler"])


class TestScaling:
    WORDS = (
        "methods=[best_of_n]",
        "budgets=[1,2]",
        "seeds=[0,1]",
        "num_prompts=3",
        "reward=scenes",
        "held_out=scenes_exact",
    )

    def test_a_study_goes_on_where_it_stopped(
        self, command: Any, run: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "study"
        words = (f"run={run}", *self.WORDS, f"out_dir={out}")
        answer = command("scaling", *words)
        assert answer.status == 0, answer.err
        cells = sorted((out / "cells").glob("*.json"))
        assert len(cells) == 2 + 4  # plain and best of N
        study = json.loads((out / "study.json").read_text())
        whole = (out / "study.json").read_bytes()
        by = {(row["method"], row["budget"]): row for row in study["rows"]}
        assert by["best_of_n", 2.0]["cost"]["nfe"] == 2 * by["none", 1.0]["cost"]["nfe"]
        reward = by["best_of_n", 1.0]["rewards"]["reward"]
        assert reward["gain"] == 0.0  # one sample is the plain one
        assert "<polygon" in (out / "scaling.html").read_text()
        # as after a kill: one cell is missing, the others stay as they are
        kept = cells[0].stat().st_mtime_ns
        cells[-1].unlink()
        again = command("scaling", *words)
        assert again.status == 0
        assert again.out.count(" at ") == 1 + again.out.count("nothing")
        assert cells[0].stat().st_mtime_ns == kept
        # seconds differ from run to run, everything else is the same
        then, now = json.loads(whole), json.loads((out / "study.json").read_text())
        for one, other in zip(then["rows"], now["rows"], strict=True):
            assert one["rewards"] == other["rewards"]

    def test_another_study_does_not_go_there(self, command: Any, run: Path, tmp_path: Path) -> None:
        words = (f"run={run}", *self.WORDS, f"out_dir={tmp_path / 's'}", "budgets=[1]", "seeds=[0]")
        assert command("scaling", *words).status == 0
        answer = command("scaling", *words, "num_prompts=4")
        assert answer.status == 1
        assert "a study with other num_prompts" in answer.err

    def test_a_damaged_cell_is_told(self, command: Any, run: Path, tmp_path: Path) -> None:
        words = (f"run={run}", *self.WORDS, f"out_dir={tmp_path / 's'}", "budgets=[1]", "seeds=[0]")
        assert command("scaling", *words).status == 0
        (tmp_path / "s/cells/none-1x-seed0.json").write_text("{")
        assert "is damaged" in command("scaling", *words).err

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["methods=[best_of_m]"], "Did you mean 'best_of_n'?"),
            (["budgets=[0.5]"], "budgets must be numbers of at least 1"),
            (["budgets=4"], "budgets must be a list"),
            (["reward=none"], "nothing to search for"),
            (["held_out=none"], "nothing else would tell"),
        ],
    )
    def test_mistakes(
        self, command: Any, text_run: Path, tmp_path: Path, words: list[str], sentence: str
    ) -> None:
        answer = command(
            "scaling", f"run={text_run}", *self.WORDS, f"out_dir={tmp_path / 's'}", *words
        )
        assert answer.status == 1
        assert sentence in answer.err


class TestSummary:
    def test_gains_are_paired_with_the_plain_sample(self) -> None:
        def cell(method: str, budget: float, values: list[float]) -> dict[str, Any]:
            samples = [
                {"id": i, "rewards": {"reward": v}, "held_out": {}, "cost": {"nfe": budget}}
                for i, v in enumerate(values)
            ]
            return {
                "method": method,
                "budget": budget,
                "seed": 0,
                "seconds": 1.0,
                "samples": samples,
            }

        rows = summarise([cell("none", 1.0, [0.0, 1.0]), cell("fk", 2.0, [0.5, 1.5])])
        (fk,) = (row for row in rows if row["method"] == "fk")
        # every pair gains one half, so the gain is sure although the values spread
        assert fk["rewards"]["reward"]["gain"] == 0.5
        assert fk["rewards"]["reward"]["gain_half"] == 0.0
        assert fk["rewards"]["reward"]["half"] > 0.5

    def test_interval(self) -> None:
        mean, half = mean_and_half([0.0, 1.0] * 50)
        assert mean == 0.5
        # 1.96 standard errors of a fair coin thrown 100 times, with n - 1
        assert half == pytest.approx(1.96 * (0.25 / 99) ** 0.5)


def test_processes_share_prompts_and_find_the_same(text_run: Path) -> None:
    """Prompts are shared out; the particles of one stay together, so nothing else can change."""
    import torch

    from genscale.pipeline import GenerationPipeline
    from genscale.rewards.scenes import SceneOracle
    from genscale.samplers.sde import DDIM
    from genscale.search.particles import FeynmanKac
    from genscale.search.setup import SearchSetup

    pipeline = GenerationPipeline.from_run(text_run, device="cpu")
    pipeline.sampler = DDIM(3, eta=1.0)
    settings: dict[str, Any] = {
        "num_samples": 5,
        "prompts": ["two red circles", "a blue square"],
        "search": SearchSetup(search=FeynmanKac(particles=3), reward=SceneOracle()),
    }
    (whole,) = pipeline.stream(**settings)
    parts = [
        batch
        for rank in (0, 1)
        for batch in pipeline.stream(**settings, rank=rank, world_size=2, batch_size=2)
    ]
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
    found = [part.search for part in parts]
    assert whole.search is not None
    for name in ("seeds", "lineage"):
        joined = torch.cat([getattr(each, name) for each in found])
        assert torch.equal(joined, getattr(whole.search, name))
    images = torch.cat([part.images for part in parts]).int()
    assert int((images - whole.images.int()).abs().max()) <= 1  # batches round differently
