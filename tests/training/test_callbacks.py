"""What happens beside the optimizer steps, in real training runs of a tiny model."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from genscale.autoencoders.identity import Identity
from genscale.backbones.dimr import DiMR
from genscale.data.base import TensorImages
from genscale.data.module import ImageDataModule
from genscale.errors import GenscaleError
from genscale.objectives.flow import FlowMatching
from genscale.runs import RunFolder, read_jsonl
from genscale.training.callbacks.base import StepCallback, due
from genscale.training.callbacks.checkpoint import RunCheckpoint
from genscale.training.callbacks.ema import UpdateEMA
from genscale.training.callbacks.finite import FiniteGuard
from genscale.training.callbacks.log import PEAK_TFLOPS, TrainLog, peak_flops
from genscale.training.callbacks.metrics import PeriodicMetrics
from genscale.training.callbacks.progress import TrainProgress
from genscale.training.callbacks.samples import SampleGrid
from genscale.training.callbacks.stop import GracefulStop
from genscale.training.ema import ConstantEMA
from genscale.training.lr_schedule import Constant
from genscale.training.module import GenerativeModule
from genscale.training.optim import AdamW
from genscale.training.run_log import RunLog

BATCH = 4


class Spoiled(GenerativeModule):
    """Trains as usual, but the loss of some optimizer steps (counted from 1) is NaN."""

    bad: frozenset[int] = frozenset()

    def training_step(self, raw: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(raw, batch_idx)
        if self.step + 1 in self.bad:
            loss = loss * float("nan")
            self.terms["loss"] = loss.detach()
        return loss


class Witness(StepCallback):
    """Keeps a copy of what every optimizer step left behind."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.averages: dict[int, dict[str, Tensor]] = {}
        self.losses: dict[int, float] = {}

    def on_step(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        self.weights[module.step] = copy.deepcopy(module.model.state_dict())
        self.averages[module.step] = copy.deepcopy(module.ema.state_dict())
        self.losses[module.step] = float(module.terms["loss"])


def model_of(*, dropout: float = 0.0, seed: int = 0) -> DiMR:
    torch.manual_seed(seed)
    return DiMR(
        input_size=8,
        in_channels=1,
        num_classes=2,
        hidden_sizes=[8],
        depths=[1],
        patch_sizes=[2],
        num_heads=2,
        kernel_sizes=3,
        dropout=dropout,
    )


def module_of(
    *, bad: tuple[int, ...] = (), dropout: float = 0.0, compile_blocks: bool = False
) -> GenerativeModule:
    module = Spoiled(
        model=model_of(dropout=dropout),
        autoencoder=Identity(latent_channels=1),
        objective=FlowMatching(),
        optimizer=AdamW(lr=1e-2),
        lr_schedule=Constant(),
        ema=ConstantEMA(decay=0.75),
        batch_size=BATCH,
        condition_dropout=0.5,
        compile_blocks=compile_blocks,
    )
    module.bad = frozenset(bad)
    return module


def pictures() -> ImageDataModule:
    pixels = torch.arange(12 * 64, dtype=torch.int64).remainder(251).to(torch.uint8)
    images = TensorImages(
        pixels.view(12, 1, 8, 8), torch.arange(12) % 2, class_names=("even", "odd")
    )
    return ImageDataModule(images, batch_size=BATCH)


def train(
    module: GenerativeModule, callbacks: list[Any], *, steps: int = 6, **options: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        # Lightning would add a checkpoint of its own, in the working directory
        enable_checkpointing=any(isinstance(one, RunCheckpoint) for one in callbacks),
        logger=options.pop("logger", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, datamodule=pictures())
    return trainer


@pytest.fixture
def log_of(tmp_path: Path) -> Callable[..., TrainLog]:
    def make(every: int = 2) -> TrainLog:
        return TrainLog(RunLog(tmp_path / "metrics.jsonl"), every=every, flops_per_sample=1000)

    return make


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


class TestSteps:
    def test_a_callback_acts_once_an_optimizer_step(self) -> None:
        witness = Witness()
        train(module_of(), [witness], steps=3, accumulate_grad_batches=2)
        assert list(witness.weights) == [1, 2, 3]

    @pytest.mark.parametrize(
        ("step", "every", "expected"),
        [(4, 2, True), (5, 2, False), (9, 2, True), (4, 0, False), (9, 0, False)],
    )
    def test_due(self, step: int, every: int, expected: bool) -> None:
        assert due(step, every, last=9) is expected  # the last step is always due, if any is


class TestFiniteGuard:
    def test_a_bad_step_changes_no_weight_and_is_counted(
        self, log_of: Callable[..., TrainLog], tmp_path: Path
    ) -> None:
        witness, guard = Witness(), FiniteGuard(max_in_row=3, every=2)
        module = module_of(bad=(3,))
        train(module, [guard, log_of(), witness])
        assert same(witness.weights[3], witness.weights[2])
        assert not same(witness.weights[4], witness.weights[3])
        assert all(torch.isfinite(value).all() for value in witness.weights[6].values())
        rows = read_jsonl(tmp_path / "metrics.jsonl")
        assert [row["train/skipped_steps"] for row in rows] == [0, 1, 1]
        assert rows[1]["train/loss"] is None  # JSON has no NaN
        assert rows[2]["train/loss"] > 0
        assert guard.state_dict() == {"skipped": 1, "in_row": 0}

    def test_many_in_a_row_stop_the_run_with_a_sentence(self) -> None:
        guard = FiniteGuard(max_in_row=3, every=100)
        # looked at every third step: after step 6 the row is 3 long, steps 4 to 6
        sentence = (
            r"^3 optimizer steps in a row had a non-finite gradient, the last at step 6 \(stream "
            r"positions 20 to 23; gradient norms by block: .* nan.*\)\. Lower optim\.lr"
        )
        with pytest.raises(GenscaleError, match=sentence):
            train(module_of(bad=(4, 5, 6, 7, 8)), [guard], steps=9)

    def test_single_bad_steps_do_not_add_up(self) -> None:
        guard = FiniteGuard(max_in_row=2, every=1)
        train(module_of(bad=(1, 3, 5)), [guard], steps=6)
        assert guard.state_dict() == {"skipped": 3, "in_row": 0}

    def test_counting_goes_on_after_a_resume(self) -> None:
        guard = FiniteGuard(max_in_row=3, every=100)
        guard.load_state_dict({"skipped": 7, "in_row": 1})
        with pytest.raises(GenscaleError, match="3 optimizer steps in a row"):
            train(module_of(bad=(1, 2, 3)), [guard], steps=3)
        assert guard.state_dict()["skipped"] == 10


class TestTrainLog:
    def test_a_row_holds_the_means_since_the_last_one(
        self, log_of: Callable[..., TrainLog], tmp_path: Path
    ) -> None:
        witness = Witness()
        train(module_of(), [log_of(every=2), witness], steps=5)
        rows = read_jsonl(tmp_path / "metrics.jsonl")
        assert [(row["step"], row["samples_seen"]) for row in rows] == [(2, 8), (4, 16), (5, 20)]
        for row, steps in zip(rows, [(1, 2), (3, 4), (5,)], strict=True):
            mean = sum(witness.losses[step] for step in steps) / len(steps)
            assert row["train/loss"] == pytest.approx(mean, rel=1e-6)
        assert rows[0]["train/gradient_norm"] > 0
        assert rows[0]["train/learning_rate"] == 1e-2

    def test_a_term_of_some_steps_is_the_mean_over_those(
        self, log_of: Callable[..., TrainLog], tmp_path: Path
    ) -> None:
        class OfOddSteps(StepCallback):  # as of one head, where each step trains one of several
            def on_step(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
                if module.step % 2:
                    module.terms["psnr"] = torch.tensor(10.0 * module.step)

        train(module_of(), [OfOddSteps(), log_of(every=4)], steps=9)
        rows = read_jsonl(tmp_path / "metrics.jsonl")
        assert [row["train/psnr"] for row in rows] == [20.0, 60.0, 90.0]

    def test_a_resumed_run_rewinds_the_file(self, tmp_path: Path) -> None:
        log = RunLog(tmp_path / "metrics.jsonl")
        for step in (5, 10, 15):
            log.append({"step": step, "train/loss": 1.0 / step})
        with log.path.open("a") as file:
            file.write('{"step": 20, "train/lo')  # killed while it wrote
        log.rewind(10)
        assert [row["step"] for row in read_jsonl(log.path)] == [5, 10]
        log.append({"step": 15, "train/loss": float("inf"), "eval/fd": 3.0})
        log.write_csv()
        assert (tmp_path / "metrics.csv").read_text().splitlines() == [
            "step,train/loss,eval/fd",
            "5,0.2,",
            "10,0.1,",
            "15,,3.0",
        ]

    def test_the_clock_goes_on_after_a_resume(self, log_of: Callable[..., TrainLog]) -> None:
        log = log_of()
        log.load_state_dict({"seconds": 1000.0})
        train(module_of(), [log], steps=2)
        assert 1000 < log.seconds < 1060

    def test_throughput_leaves_out_what_is_no_training(
        self, log_of: Callable[..., TrainLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [0.0]
        clock = SimpleNamespace(perf_counter=lambda: now[0])
        for room in ("log", "samples", "metrics", "checkpoint"):
            monkeypatch.setattr(f"genscale.training.callbacks.{room}.time", clock)

        class Tick(StepCallback):
            def on_step(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
                now[0] += 0.5

        class SlowPipeline:
            num_classes = 2
            text = None
            frame_rate = None

            def generate(self, **settings: Any) -> Tensor:
                now[0] += 100
                return torch.zeros(4, 1, 8, 8, dtype=torch.uint8)

        def slow_evaluation(*arguments: Any) -> dict[str, float]:
            now[0] += 1000
            return {"fd": 1.0}

        log, pipeline, run = log_of(every=2), SlowPipeline(), RunFolder(tmp_path)
        callbacks = [
            Tick(),
            log,
            SampleGrid(pipeline, run, every=3, count=4, seed=0, log=log),  # type: ignore[arg-type]
            PeriodicMetrics(pipeline, slow_evaluation, every=4, num_samples=4, log=log),  # type: ignore[arg-type]
        ]
        train(module_of(), callbacks, steps=6)
        rows = [row for row in read_jsonl(log.run_log.path) if "train/loss" in row]
        # two steps of 4 samples in two half seconds, whatever sampling took
        assert [row["train/samples_per_second"] for row in rows] == [8.0, 8.0, 8.0]
        # three forwards' worth of operations a training sample
        assert rows[0]["train/gflops_per_second"] == 3 * 8.0 * 1000 / 1e9
        assert log.seconds == 6 * 0.5 + 2 * 100 + 2 * 1000  # the whole of it is told, too

    def test_peak_rates_are_those_of_the_data_sheets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert peak_flops(torch.device("cpu")) is None
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
        # 989 dense bfloat16 TFLOP/s: H200 data sheet, half of its figure "with sparsity"
        assert peak_flops(torch.device("cuda")) == 989e12 == PEAK_TFLOPS["H200"] * 1e12
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another")
        assert peak_flops(torch.device("cuda")) is None


class TestProgress:
    def test_lines_where_there_is_no_terminal(
        self, log_of: Callable[..., TrainLog], capsys: pytest.CaptureFixture[str]
    ) -> None:
        log = log_of(every=2)
        train(module_of(), [log, TrainProgress(log, every_seconds=0)], steps=3)
        lines = capsys.readouterr().err.splitlines()
        assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]
        assert "loss -" in lines[0]  # no row is written yet, and none is asked for
        assert f"loss {log.latest['train/loss']:.4f}" in lines[2]


class TestAverage:
    def test_what_is_saved_is_the_average_after_the_step(
        self, log_of: Callable[..., TrainLog], tmp_path: Path
    ) -> None:
        log, witness = log_of(), Witness()
        saver = RunCheckpoint(RunFolder(tmp_path), every=1, keep=9, keep_every=0, log=log)
        module = module_of()
        before = copy.deepcopy(module.ema.state_dict())
        trainer = train(module, [saver, UpdateEMA(), witness, log], steps=3)
        assert trainer.callbacks[-1] is saver  # type: ignore[attr-defined]
        for step in (1, 2, 3):
            saved = torch.load(tmp_path / "checkpoints" / f"step-{step:08d}.ckpt")["state_dict"]
            for name, weight in witness.weights[step].items():
                average = saved[f"ema.{name}"]
                # decay 0.75: average <- 0.75 average + 0.25 weight
                expected = 0.75 * before[name] + 0.25 * weight
                torch.testing.assert_close(average, expected, rtol=0, atol=1e-6)
                before[name] = average
                assert torch.equal(saved[f"model.{name}"], weight)

    def test_bfloat16_training_keeps_float32_weights_and_average(self) -> None:
        module, witness = module_of(), Witness()
        trainer = train(module, [UpdateEMA(), witness], steps=3, precision="bf16-mixed")
        assert {p.dtype for p in module.model.parameters()} == {torch.float32}
        assert {p.dtype for p in module.ema.parameters()} == {torch.float32}
        moments = trainer.optimizers[0].state.values()
        assert {state["exp_avg"].dtype for state in moments} == {torch.float32}
        assert not same(witness.averages[3], witness.averages[1])

    def test_the_average_is_never_trained(self) -> None:
        module = module_of()
        module.train()
        assert not module.ema.training
        assert not any(p.requires_grad for p in module.ema.parameters())
        assert module.model.training


class TestCheckpoints:
    def test_the_newest_and_the_milestones_are_kept(
        self, log_of: Callable[..., TrainLog], tmp_path: Path
    ) -> None:
        log = log_of()
        saver = RunCheckpoint(RunFolder(tmp_path), every=2, keep=2, keep_every=4, log=log)
        train(module_of(), [log, saver], steps=11)
        # 2 and 6 are gone; 10 and 11 are the newest, 11 being the end; 4 and 8 are milestones
        assert list(RunFolder(tmp_path).checkpoints()) == [4, 8, 10, 11]
        files = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        assert all(name.startswith("step-") for name in files)  # no temporary is left
        assert (tmp_path / "metrics.csv").is_file()

    def test_only_the_end_is_saved_where_no_interval_is_given(
        self, log_of: Callable[..., TrainLog], tmp_path: Path
    ) -> None:
        log = log_of()
        saver = RunCheckpoint(RunFolder(tmp_path), every=0, keep=1, keep_every=0, log=log)
        train(module_of(), [log, saver], steps=3)
        assert list(RunFolder(tmp_path).checkpoints()) == [3]

    def test_a_save_that_breaks_off_leaves_the_earlier_ones_alone(
        self,
        log_of: Callable[..., TrainLog],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        log, run = log_of(), RunFolder(tmp_path)
        saver = RunCheckpoint(run, every=1, keep=1, keep_every=0, log=log)
        save = pl.Trainer.save_checkpoint

        def disk_full(trainer: pl.Trainer, path: Path, **options: Any) -> None:
            save(trainer, path, **options)
            if "00000003" in str(path):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(pl.Trainer, "save_checkpoint", disk_full)
        with pytest.raises(OSError, match="No space left"):
            train(module_of(), [log, saver], steps=5)
        assert list(run.checkpoints()) == [2]
        assert torch.load(run.checkpoint("latest"))["genscale"]["step"] == 2


class TestSampleGrid:
    def test_every_look_asks_for_the_same_samples(
        self, log_of: Callable[..., TrainLog], tmp_path: Path
    ) -> None:
        asked = []

        class Pipeline:
            num_classes = 2
            text = None
            frame_rate = None

            def generate(self, **settings: Any) -> Tensor:
                asked.append(settings)
                return torch.zeros(6, 1, 8, 8, dtype=torch.uint8)

        grid = SampleGrid(
            Pipeline(),  # type: ignore[arg-type]
            RunFolder(tmp_path),
            every=2,
            count=6,
            seed=3,
            log=log_of(),
        )
        train(module_of(), [grid], steps=5)
        assert asked == [{"num_samples": 6, "seed": 3}] * 3
        names = sorted(path.name for path in (tmp_path / "samples").iterdir())
        assert names == ["step-00000002.png", "step-00000004.png", "step-00000005.png"]

    def test_looking_does_not_disturb_the_training(
        self, log_of: Callable[..., TrainLog], tmp_path: Path
    ) -> None:
        class Pipeline:
            num_classes = 2
            text = None
            frame_rate = None

            def generate(self, **settings: Any) -> Tensor:
                torch.rand(100)  # whatever it does to torch's own generator
                return torch.zeros(6, 1, 8, 8, dtype=torch.uint8)

        undisturbed, disturbed = Witness(), Witness()
        train(module_of(dropout=0.3), [undisturbed], steps=4)
        grid = SampleGrid(
            Pipeline(),  # type: ignore[arg-type]
            RunFolder(tmp_path),
            every=1,
            count=6,
            seed=0,
            log=log_of(),
        )
        train(module_of(dropout=0.3), [grid, disturbed], steps=4)
        assert same(undisturbed.weights[4], disturbed.weights[4])


class TestPeriodicMetrics:
    def test_rows_and_loggers_get_the_numbers(
        self, log_of: Callable[..., TrainLog], tmp_path: Path
    ) -> None:
        told: list[tuple[int, dict[str, float]]] = []

        class Logger(pl.loggers.logger.DummyLogger):
            def log_metrics(self, metrics: Any, step: int | None = None) -> None:
                told.append((step or 0, dict(metrics)))

        def evaluate(pipeline: Any, count: int, rank: int, world_size: int) -> dict[str, float]:
            assert (pipeline, count, rank, world_size) == ("pipeline", 50, 0, 1)
            return {"fd_probe": 1.5, "recall": 0.25}

        log = log_of(every=100)
        metrics = PeriodicMetrics("pipeline", evaluate, every=2, num_samples=50, log=log)  # type: ignore[arg-type]
        train(module_of(), [log, metrics], steps=4, logger=Logger())
        rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "eval/recall" in row]
        assert [(row["step"], row["samples_seen"]) for row in rows] == [(2, 8), (4, 16)]
        assert rows[0]["eval/fd_probe"] == 1.5
        assert (2, {"eval/fd_probe": 1.5, "eval/recall": 0.25}) in told


class TestGracefulStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
        self, log_of: Callable[..., TrainLog], tmp_path: Path, number: int
    ) -> None:
        class Impatient(StepCallback):
            def on_step(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
                if module.step == 3:
                    os.kill(os.getpid(), number)

        before = signal.getsignal(number)
        log, stop = log_of(), GracefulStop(every=100)
        saver = RunCheckpoint(RunFolder(tmp_path), every=0, keep=1, keep_every=0, log=log)
        module = module_of()
        train(module, [Impatient(), stop, log, saver], steps=50)
        assert stop.received == number
        assert module.step == 3
        assert list(RunFolder(tmp_path).checkpoints()) == [3]
        assert signal.getsignal(number) == before  # handed back

    def test_a_second_signal_does_not_wait(self) -> None:
        class Insistent(StepCallback):
            def on_step(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

        module = module_of()
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(module, [Insistent(), GracefulStop(every=1)], steps=50)
        assert module.step == 1


class TestCompile:
    def test_blocks_are_compiled_in_place_once(self) -> None:
        module = module_of(compile_blocks=True)
        keys = list(module.state_dict())
        module.configure_model()
        module.configure_model()  # Lightning may call it again
        compiled = {
            type(part).__name__
            for part in module.model.modules()
            if part._compiled_call_impl is not None
        }
        assert compiled
        assert compiled <= set(module.model.block_classes)
        assert list(module.state_dict()) == keys  # checkpoints do not know about it
