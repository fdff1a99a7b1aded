"""What sample.py and evaluate.py share: a run read back, and its samples collected."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from genscale import dist
from genscale.cli import progress
from genscale.cli.loading import (
    datasets_of,
    inherit,
    is_exported,
    load_pipeline,
    output_folder,
)
from genscale.cli.progress import track
from genscale.cli.sample import collect, grid_columns, label_law, stream_settings
from genscale.cli.train import module_pipeline
from genscale.errors import CheckpointError, ConfigError
from genscale.evaluation import as_record, class_law, describe, fit_reference, measure, periodic
from genscale.guidance.cfg import ClassifierFree
from genscale.metrics.pixels import Pixels
from genscale.metrics.suite import EvaluationSuite
from genscale.pipeline import Generated, GenerationPipeline, exported_config
from genscale.runs import RunFolder
from genscale.samplers.ode import Heun


def settings(run: Path, **changes: Any) -> Any:
    node = {
        "run": str(run),
        "checkpoint": "latest",
        "weights": "ema",
        "device": "cpu",
        "precision": "float32",
        "out_dir": None,
        "num_samples": 6,
        "batch_size": 4,
        "labels": "balanced",
        "prompts": None,
        "negative_prompt": None,
        "seed": 0,
        "sampler": {"_target_": None, "steps": None},
        "guidance": {"_target_": None, "scale": None, "interval": None},
        "autoencoder": {"source": None},
        "text_encoder": {"source": None, "second_source": None},
    }
    return OmegaConf.create(node | changes)


class TestInherit:
    own = {"_target_": "genscale.samplers.ode.Euler", "steps": 20, "shift": 3.0}

    def test_nothing_given_keeps_the_runs_own(self) -> None:
        given = OmegaConf.create({"_target_": None, "steps": None})
        assert inherit(given, self.own) == self.own

    def test_a_number_replaces_its_own(self) -> None:
        given = OmegaConf.create({"_target_": None, "steps": 50})
        assert inherit(given, self.own) == {**self.own, "steps": 50}

    def test_a_whole_group_replaces_all_of_it(self) -> None:
        given = OmegaConf.create({"_target_": "genscale.samplers.ode.Heun", "steps": 5})
        assert inherit(given, self.own) == {"_target_": "genscale.samplers.ode.Heun", "steps": 5}

    def test_a_scale_turns_guidance_on_in_an_unguided_run(self) -> None:
        own = {"_target_": "genscale.guidance.base.Unguided"}
        given = OmegaConf.create({"_target_": None, "scale": 2.0, "interval": None})
        assert inherit(given, own) == {
            "_target_": "genscale.guidance.cfg.ClassifierFree",
            "scale": 2.0,
        }


class TestLoading:
    def test_sampler_and_guidance_as_asked(self, trained_run: Path) -> None:
        cfg = settings(
            trained_run,
            sampler={"_target_": "genscale.samplers.ode.Heun", "steps": 2},
            guidance={"_target_": None, "scale": 3.0, "interval": None},
            precision="bfloat16",
        )
        pipeline, sampler, guidance = load_pipeline(cfg)
        assert isinstance(pipeline.sampler, Heun)
        assert isinstance(pipeline.guidance, ClassifierFree)
        assert pipeline.precision == "bfloat16"
        assert (sampler["steps"], guidance["scale"]) == (2, 3.0)

    def test_a_run_and_its_export_are_told_apart(self, trained_run: Path) -> None:
        assert is_exported(trained_run / "export")
        assert not is_exported(trained_run)
        assert not is_exported("/nowhere")
        config = exported_config(trained_run / "export")
        assert set(config) >= {"model", "sampler", "guidance", "data_info"}
        assert "optim" not in config  # only what sampling needs
        with pytest.raises(CheckpointError, match="is no exported folder"):
            exported_config(trained_run)

    def test_the_data_of_a_run(self, trained_run: Path) -> None:
        data = datasets_of(str(trained_run))
        assert (len(data.train), len(data.heldout), data.resolution) == (1437, 360, 8)
        with pytest.raises(ConfigError, match=r"is an exported folder.*Give reference="):
            datasets_of(str(trained_run / "export"))

    def test_results_get_a_new_folder_or_the_one_named(
        self, trained_run: Path, tmp_path: Path
    ) -> None:
        chosen = output_folder(settings(trained_run, out_dir=str(tmp_path / "a" / "b")), "samples")
        assert chosen == tmp_path / "a" / "b"
        assert chosen.is_dir()
        (tmp_path / "genscale.json").write_text("{}")
        made = [output_folder(settings(tmp_path), "evaluations") for _ in range(2)]
        assert made[0] != made[1]
        assert {folder.parent for folder in made} == {tmp_path / "evaluations"}

    def test_training_samples_the_average_as_it_is_now(self, trained_run: Path) -> None:
        cfg = OmegaConf.create(RunFolder(trained_run).config())
        model = GenerationPipeline.from_run(trained_run, device="cpu")
        module = SimpleNamespace(
            ema=model.model,
            autoencoder=model.autoencoder,
            objective=model.objective,
            text=None,
        )
        pipeline = module_pipeline(cfg, module)
        assert pipeline.model is module.ema  # shared, not copied
        assert pipeline.class_names == tuple("0123456789")
        assert torch.equal(pipeline.generate(num_samples=2), model.generate(num_samples=2))


class TestCollecting:
    def test_ids_pictures_labels_and_evaluations(self, trained_run: Path) -> None:
        cfg = settings(trained_run, labels=[2, 5])
        pipeline, _, _ = load_pipeline(cfg)
        alone = stream_settings(cfg, rank=0, world_size=1)
        ids, images, labels, nfe, *_ = collect(pipeline, alone)
        assert ids.tolist() == list(range(6))
        assert images.shape == (6, 1, 8, 8)
        assert labels.tolist() == [2, 5] * 3
        assert nfe.tolist() == [3.0] * 6

    def test_a_share_can_be_empty(self, trained_run: Path) -> None:
        cfg = settings(trained_run, num_samples=1)
        pipeline, _, _ = load_pipeline(cfg)
        half = stream_settings(cfg, rank=0, world_size=2)  # of one: none
        ids, images, labels, *_ = collect(pipeline, half)
        assert (len(ids), len(labels)) == (0, 0)
        assert images.shape == (0, 1, 8, 8)

    @pytest.mark.parametrize(
        ("labels", "law", "columns"),
        [
            ("balanced", "balanced", 10),  # one class a column
            ("random", "random", None),
            (7, [7], None),
            ([3, 7], [3, 7], 8),
            ([1, 2, 3], [1, 2, 3], 3),
            (list(range(10)) * 2, list(range(10)) * 2, None),
        ],
    )
    def test_labels_and_the_width_of_a_grid(
        self, trained_run: Path, labels: Any, law: Any, columns: int | None
    ) -> None:
        cfg = settings(trained_run, labels=labels)
        assert label_law(cfg) == law
        assert grid_columns(cfg, SimpleNamespace(num_classes=10)) == columns

    def test_progress_passes_all_batches_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        batches = [SimpleNamespace(ids=torch.arange(3)) for _ in range(4)]
        clock = iter(range(0, 1000, 6))  # a look every six seconds
        monkeypatch.setattr(
            progress, "time", SimpleNamespace(perf_counter=lambda: float(next(clock)))
        )
        said = io.StringIO()
        monkeypatch.setattr(sys, "stderr", said)
        assert list(track(batches, "sampling", total=12)) == batches
        # a line at 12 and at 24 seconds: 6 and 12 of 12 done
        assert said.getvalue().splitlines() == [
            "sampling 6/12, 12 s left",
            "sampling 12/12, 0 s left",
        ]
        assert list(track(batches, "sampling", total=12, show=False)) == batches


class TestEvaluation:
    @pytest.fixture
    def suite(self) -> EvaluationSuite:
        return EvaluationSuite(metrics=["fd_pixels"], features=[Pixels()])

    def test_numbers_are_stored_beside_their_protocols(
        self, trained_run: Path, suite: EvaluationSuite
    ) -> None:
        pipeline = GenerationPipeline.from_run(trained_run, device="cpu")
        fit_reference(suite, datasets_of(str(trained_run)))
        batches = [
            Generated(ids, torch.full((2, 1, 8, 8), 9, dtype=torch.uint8), ids % 10, nfe)
            for ids, nfe in (
                (torch.tensor([0, 1]), torch.tensor([4.0, 4.0])),
                (torch.tensor([2, 3]), torch.tensor([6.0, 6.0])),
            )
        ]
        nfe = measure(suite, batches)
        assert nfe == 5.0
        protocol = describe(pipeline, labels="balanced", num_samples=4, nfe=nfe, weights="raw")
        record = as_record(suite.compute(protocol))
        (metric,) = record["metrics"]
        assert metric["name"] == "fd_pixels"
        assert record["protocols"][metric["protocol"]]["class_law"] == "balanced"
        assert record["protocols"][metric["protocol"]]["nfe"] == 5.0

    def test_a_large_training_set_is_compared_in_part(self, trained_run: Path) -> None:
        digests = set()
        for _ in range(2):
            suite = EvaluationSuite(["fd_pixels"], [Pixels()], max_reference=100)
            fit_reference(suite, datasets_of(str(trained_run)))
            suite.update(torch.arange(4 * 64, dtype=torch.int64).to(torch.uint8).view(4, 1, 8, 8))
            (value,) = suite.compute()
            assert value.protocol is not None
            assert value.protocol.reference_count == 100
            digests.add((value.value, value.protocol_hash))
        assert len(digests) == 1  # the part is keyed

    def test_a_reference_of_nothing_is_refused(self) -> None:
        (problem,) = EvaluationSuite(["fd_pixels"], [Pixels()], max_reference=1).check()
        assert problem.startswith("metrics.max_reference must be at least 2, but is 1.")

    def test_periodic_evaluation_starts_afresh_every_time(
        self, trained_run: Path, suite: EvaluationSuite
    ) -> None:
        pipeline = GenerationPipeline.from_run(trained_run, device="cpu")
        evaluate = periodic(suite, datasets_of(str(trained_run)), seed=0)
        first = evaluate(pipeline, 8, 0, 1)
        assert set(first) == {"fd_pixels"}
        assert evaluate(pipeline, 8, 0, 1) == first  # the first set is not counted again

    @pytest.mark.parametrize(
        ("labels", "classes", "name"),
        [
            ("balanced", 10, "balanced"),
            ("random", 10, "uniform_random"),
            ([1], 10, "listed"),
            ("balanced", 0, "unconditional"),
        ],
    )
    def test_class_laws_have_names(self, labels: Any, classes: int, name: str) -> None:
        assert class_law(labels, classes) == name


class TestAlone:
    """One process needs no group."""

    def test_gathering(self) -> None:
        assert dist.gather_objects("a") == ["a"]
        ids, values = dist.gather_rows(torch.tensor([2, 0]), torch.tensor([20.0, 0.0]))
        assert (ids.tolist(), values.tolist()) == ([0, 2], [0.0, 20.0])

    def test_launching(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        assert dist.launched() == 1
        assert dist.initialise() == (0, 1)
        assert dist.agree("run", lambda: "here") == "here"
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert dist.launched() == 1  # Lightning's own processes have no RANK
        monkeypatch.setenv("RANK", "0")
        assert dist.launched() == 4
        dist.finish()  # no group: nothing to leave
