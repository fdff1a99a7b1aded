"""Several averages, reconstructed ones and autoguidance, from the command line and from Python."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genscale.cli.app import main
from genscale.errors import CheckpointError, ConfigError
from genscale.evaluation import describe
from genscale.guidance.autoguidance import Autoguidance, WeakSettings
from genscale.io.weights import read_checkpoint
from genscale.pipeline import GenerationPipeline
from genscale.runs import RunFolder
from genscale.training.posthoc import find_snapshots
from genscale.weak_models import WeakModel, WeakModels

Answer = Any


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[str, ...]) -> Path:
    """A run of two averages with checkpoints of steps 10 and 20, and four snapshots of each."""
    folder = tmp_path_factory.mktemp("averages") / "run"
    words = (*tiny, "ema=posthoc", "ema.snapshot_every=5", f"run_dir={folder}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENSCALE_RUN_DIR", "")
        assert main("train", "genscale.cli.train:run", argv=list(words)) == 0
    return folder


@pytest.fixture
def posthoc(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def make(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main("posthoc", "genscale.cli.posthoc:run", argv=list(words))
        return (status, *capsys.readouterr())

    return make


@pytest.fixture
def remade(run: Path, tmp_path: Path, posthoc: Any) -> Path:
    """A copy of the run with two reconstructed averages."""
    copy = Path(shutil.copytree(run, tmp_path / "remade"))
    status, _, err = posthoc(f"run={copy}", "sigma_rel=[0.05,0.08]")
    assert status == 0, err
    return copy


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


class TestWeights:
    def test_every_average_can_be_asked_for(self, run: Path) -> None:
        stored = read_checkpoint(RunFolder(run).checkpoint(20))["state_dict"]
        for weights, prefix in (
            ("ema", "ema."),
            ("ema_0.05", "ema."),
            ("ema_0.1", "further_averages.ema_0_1."),
            ("raw", "model."),
        ):
            pipeline = GenerationPipeline.from_run(run, weights=weights, device="cpu")
            state = {prefix + name: value for name, value in pipeline.model.state_dict().items()}
            assert all(torch.equal(value, stored[name]) for name, value in state.items())
        names = [path.name for path in sorted((run / "ema_snapshots").iterdir())]
        assert names == [
            f"ema_{width}_step-{step:08d}.safetensors"
            for width in (0.05, 0.1)
            for step in (5, 10, 15, 20)
        ]
        last = read_checkpoint(run / "ema_snapshots" / names[3])
        assert same(last, GenerationPipeline.from_run(run, device="cpu").model.state_dict())

    def test_a_reconstructed_average_is_one_more(self, run: Path, remade: Path) -> None:
        with pytest.raises(CheckpointError, match=r"not been .*sigma_rel=\[0.08\]$"):
            GenerationPipeline.from_run(run, weights="posthoc_0.08")
        ours = GenerationPipeline.from_run(remade, weights="posthoc_0.08", device="cpu")
        assert ours.origin is not None
        assert (ours.origin.weights, ours.origin.step) == ("posthoc_0.08", 20)
        # between the two that were tracked: nearer to either than they are to one another
        tracked = [
            GenerationPipeline.from_run(remade, weights=name, device="cpu").model.state_dict()
            for name in ("ema_0.05", "ema_0.1")
        ]
        apart = _distance(*tracked)
        assert all(0 < _distance(ours.model.state_dict(), state) < 0.8 * apart for state in tracked)
        # what was stored is given back
        again = GenerationPipeline.from_run(remade, weights="posthoc_0.05", device="cpu")
        assert _distance(again.model.state_dict(), tracked[0]) < 1e-5 * apart
        with pytest.raises(CheckpointError, match=r"raw, ema_0.1, posthoc_0.05, posthoc_0.08, but"):
            GenerationPipeline.from_run(remade, weights="ema_0.2")

    def test_a_reconstruction_has_a_step_of_its_own(self, remade: Path, posthoc: Any) -> None:
        words = {"weights": "posthoc_0.08", "device": "cpu"}
        GenerationPipeline.from_run(remade, checkpoint=20, **words)
        with pytest.raises(CheckpointError, match=r"at step 20, but checkpoint=10 is of step 10"):
            GenerationPipeline.from_run(remade, checkpoint=10, **words)
        status, out, err = posthoc(f"run={remade}", "sigma_rel=0.08", "step=10")
        assert status == 0, err
        assert "posthoc_0.08_step-10.safetensors: step 10, from 4 snapshots, residual" in out
        words["weights"] = "posthoc_0.08_step-10"
        assert GenerationPipeline.from_run(remade, checkpoint=10, **words).origin.step == 10  # type: ignore[union-attr]

    def test_sampling_says_which_weights_and_step(
        self, remade: Path, command: Any, tmp_path: Path
    ) -> None:
        words = (f"run={remade}", "weights=posthoc_0.08", "num_samples=2", f"out_dir={tmp_path}/s")
        assert command("sample", *words).status == 0
        record = json.loads((tmp_path / "s" / "samples.json").read_text())
        assert (record["weights"], record["step"]) == ("posthoc_0.08", 20)

    def test_evaluation_names_the_very_average(
        self, remade: Path, command: Any, tmp_path: Path
    ) -> None:
        metrics = "metrics.metrics=[fd_pixels]"
        for weights, public in (("ema", "ema_0.05"), ("ema_0.1", "ema_0.1"), ("raw", "raw")):
            out = tmp_path / weights
            words = (f"run={remade}", f"weights={weights}", metrics, "num_samples=4")
            answer = command("evaluate", *words, "sampler.steps=1", f"out_dir={out}")
            assert answer.status == 0, answer.err
            record = json.loads((out / "metrics.json").read_text())
            assert [p["weights"] for p in record["protocols"].values()] == [public]
            assert record["step"] == 20

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            ((), "'sigma_rel' has no default"),
            (("sigma_rel=long",), "sigma_rel must be a number or a list of different numbers"),
            (("sigma_rel=[0.1,0.1]",), "list of different numbers, but [0.1, 0.1] was given"),
            (("sigma_rel=0.3",), "sigma_rel must lie in (0, 0.28), but 0.3"),
            (("sigma_rel=0.1", "step=7"), "No snapshots of step 7"),
            (("sigma_rel=0.1", "step=last"), "step must be a whole number, but 'last'"),
            (("sigma_rel=0.1", "stepp=5"), "Did you mean 'step'?"),
            (("sigma_rel=0.1", "run=/nowhere"), "run=/nowhere is no run folder"),
        ],
    )
    def test_mistakes_are_told_in_a_sentence(
        self, run: Path, posthoc: Any, words: tuple[str, ...], sentence: str
    ) -> None:
        status, out, err = posthoc(f"run={run}", *words)
        assert (status, out) == (1, "")
        assert sentence in err
        assert "Traceback" not in err
        assert not (run / "averages").exists()


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    squares = [(one[name] - other[name]).double().square().sum() for name in one]
    return float(torch.stack(squares).sum().sqrt())


def test_a_resumed_run_leaves_the_snapshots_of_one_left_alone(
    command: Any, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    words = (*tiny, "ema=posthoc", "ema.snapshot_every=4", "lr_schedule=constant")
    words = (*words, "callbacks.checkpoint_every=6", "callbacks.sample_every=0")
    assert command("train", *words, f"run_dir={tmp_path}/whole").status == 0
    broken = (*words, f"run_dir={tmp_path}/broken")
    assert command("train", *broken, "trainer.max_steps=11").status == 0
    snapshots = tmp_path / "broken" / "ema_snapshots"
    assert sorted({profile.step for profile in find_snapshots(snapshots)}) == [4, 8, 11]
    checkpoint = RunFolder(tmp_path / "broken").checkpoint(6)
    answer = command("train", *broken, f"resume={checkpoint}")
    assert answer.status == 0, answer.err
    kept, whole = find_snapshots(snapshots), find_snapshots(tmp_path / "whole" / "ema_snapshots")
    assert sorted({profile.step for profile in whole}) == [4, 8, 12, 16, 20]
    assert kept.keys() == whole.keys()
    assert all(kept[profile].read_bytes() == whole[profile].read_bytes() for profile in whole)


class TestAutoguidance:
    def sample(self, command: Any, out: Path, *words: str) -> Answer:
        return command("sample", "num_samples=3", f"out_dir={out}", *words)

    @pytest.mark.parametrize(
        ("words", "name"),
        [
            (("guidance.weak_weights=ema_0.1",), "RUN step 20 ema_0.1"),
            (("guidance.weak_checkpoint=10",), "RUN step 10 ema_0.05"),
            (("checkpoint=10", "guidance.weak_weights=raw"), "RUN step 10 raw"),
            (("guidance.weak_run=OTHER",), "OTHER step 20 ema_0.998"),
            (("guidance.weak_run=OTHER/export",), "EXPORT ema"),
        ],
    )
    def test_the_weak_model_is_found_and_named(
        self,
        command: Any,
        run: Path,
        trained_run: Path,
        tmp_path: Path,
        words: tuple[str, ...],
        name: str,
    ) -> None:
        given = [word.replace("OTHER", str(trained_run)) for word in words]
        answer = self.sample(command, tmp_path, f"run={run}", "guidance=autoguidance", *given)
        assert answer.status == 0, answer.err
        record = json.loads((tmp_path / "samples.json").read_text())
        places = {
            "RUN": f"{run.parent.name}/{run.name}",
            "OTHER": f"{trained_run.parent.name}/{trained_run.name}",
            "EXPORT": f"{trained_run.name}/export",
        }
        for word, place in places.items():
            name = name.replace(word, place)
        assert record["guidance"]["weak_model"] == name
        assert record["guidance"]["weak_flops"] == 1.0  # networks of one size
        assert record["nfe_per_sample"] == 6.0  # three steps of two networks
        assert record["guidance"]["scale"] == 2.0

    def test_it_is_the_formula_of_two_views(self, run: Path, trained_run: Path) -> None:
        ours = GenerationPipeline.from_run(run, device="cpu")
        weak = GenerationPipeline.from_run(trained_run, weights="raw", device="cpu")
        by_hand = Autoguidance(weak.objective.view(weak.model), 1.7)
        by_name = Autoguidance(scale=1.7, weak_run=str(trained_run), weak_weights="raw")
        first = ours.generate(num_samples=3, guidance=by_hand)
        assert torch.equal(ours.generate(num_samples=3, guidance=by_name), first)
        assert not torch.equal(ours.generate(num_samples=3), first)
        assert ours.weak_models.find(by_name.settings, ours).name.endswith(" step 20 raw")

    def test_protocols_name_the_weak_model(self, run: Path, trained_run: Path) -> None:
        pipeline = GenerationPipeline.from_run(run, device="cpu")
        labels = []
        for weak_run in (None, str(trained_run)):
            pipeline.guidance = Autoguidance(weak_run=weak_run, weak_weights="raw")
            protocol = describe(
                pipeline, labels="balanced", num_samples=4, nfe=6.0, weights="ema_0.05"
            )
            labels.append(protocol.guidance)
            assert protocol.guidance_scale == 2.0
        assert labels[0] == f"Autoguidance by {run.parent.name}/{run.name} step 20 raw"
        assert labels[0] != labels[1]

    def test_a_smaller_weak_model_costs_its_share(
        self, command: Any, run: Path, tiny: tuple[str, ...], tmp_path: Path
    ) -> None:
        small = ("model.hidden_sizes=[8,8]", "trainer.max_steps=2", "callbacks.sample_every=0")
        assert command("train", *tiny, *small, f"run_dir={tmp_path}/small").status == 0
        words = (f"run={run}", "guidance=autoguidance", f"guidance.weak_run={tmp_path}/small")
        assert self.sample(command, tmp_path / "s", *words).status == 0
        record = json.loads((tmp_path / "s" / "samples.json").read_text())
        expected = [
            GenerationPipeline.from_run(path, device="cpu").model.flops()
            for path in (tmp_path / "small", run)
        ]
        assert record["guidance"]["weak_flops"] == round(expected[0] / expected[1], 4)
        assert 0.1 < record["guidance"]["weak_flops"] < 0.9
        assert record["nfe_per_sample"] == 6.0  # evaluations, however small

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            ((), "is the model itself, weight by weight. Give guidance.weak_run="),
            (("guidance.weak_weights=ema_0.2",), "must be one of ema, raw, ema_0.1, but 'ema_0.2'"),
            (("guidance.weak_checkpoint=7",), "No checkpoint of step 7"),
            (("guidance.weak_run=/nowhere",), "run=/nowhere is no run folder"),
            (
                ("guidance.weak_run=RUN/export", "guidance.weak_weights=raw"),
                "holds the last averaged weights alone",
            ),
            (("run=RUN/export",), "guidance.weak_run is not given"),
        ],
    )
    def test_mistakes_are_told_in_a_sentence(
        self, command: Any, run: Path, tmp_path: Path, words: tuple[str, ...], sentence: str
    ) -> None:
        given = [word.replace("RUN", str(run)) for word in words]
        own = [] if any(word.startswith("run=") for word in given) else [f"run={run}"]
        answer = self.sample(command, tmp_path / "s", "guidance=autoguidance", *own, *given)
        assert (answer.status, answer.out) == (1, "")
        assert sentence in answer.err
        assert "Traceback" not in answer.err

    def test_a_weak_model_of_other_pictures_is_refused(
        self, run: Path, trained_run: Path, tmp_path: Path
    ) -> None:
        other = Path(shutil.copytree(trained_run, tmp_path / "other"))
        config = yaml.safe_load((other / "config.yaml").read_text())
        config["data_info"]["name"] = "letters"
        (other / "config.yaml").write_text(yaml.safe_dump(config))
        pipeline = GenerationPipeline.from_run(run, device="cpu")
        with pytest.raises(ConfigError, match=r"other pictures: .* letters, but the model makes"):
            pipeline.generate(num_samples=1, guidance=Autoguidance(weak_run=str(other)))

    def test_without_a_weak_model_there_is_no_view(self, run: Path) -> None:
        pipeline = GenerationPipeline.from_run(run, device="cpu")
        with pytest.raises(ConfigError, match="has no weak model yet"):
            Autoguidance().wrap(pipeline.objective.view(pipeline.model))

    def test_training_is_guided_by_an_average_as_it_is_now(
        self, command: Any, tiny: tuple[str, ...], tmp_path: Path
    ) -> None:
        words = ("ema=several", "ema.decays=[0.9,0.5]", "guidance=autoguidance")
        weak = "guidance.weak_weights=ema_0.5"
        folder = tmp_path / "run"
        answer = command("train", *tiny, *words, weak, f"run_dir={folder}")
        assert answer.status == 0, answer.err
        # afterwards it is the run's own guidance
        pipeline = GenerationPipeline.from_run(folder, device="cpu")
        (batch,) = pipeline.stream(num_samples=3)
        assert batch.nfe.tolist() == [6.0] * 3

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("ema=several",), "must be one of ema_0.99, ema_0.9995, but 'ema' was given"),
            (("ema=several", "guidance.weak_checkpoint=3"), "has no checkpoints. Give guidance."),
            ((), "leads away from another run or another average, but there is neither"),
            (("guidance.weak_run=/nowhere",), "run=/nowhere is no run folder"),
        ],
    )
    def test_training_is_refused_before_it_begins(
        self,
        command: Any,
        tiny: tuple[str, ...],
        tmp_path: Path,
        words: tuple[str, ...],
        sentence: str,
    ) -> None:
        folder = tmp_path / "refused"
        answer = command("train", *tiny, "guidance=autoguidance", *words, f"run_dir={folder}")
        assert (answer.status, answer.out) == (1, "")
        assert sentence in answer.err
        assert not folder.exists()

    def test_a_model_at_hand_needs_no_loading(self, run: Path) -> None:
        def load(*_: Any, **__: Any) -> Any:
            raise AssertionError("it was there")

        pipeline, models = GenerationPipeline.from_run(run, device="cpu"), WeakModels(load)
        guidance = Autoguidance(weak_weights="mine")
        settings = WeakSettings(run=None, checkpoint=None, weights="mine")
        models.add(settings, WeakModel(pipeline.model, pipeline.objective, "mine"))
        led = models.lead(guidance, pipeline)
        assert isinstance(led, Autoguidance)
        assert led.label == "Autoguidance by mine"
        assert models.lead(led, pipeline) is led
        assert Autoguidance().label == "Autoguidance"
