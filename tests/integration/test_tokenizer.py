"""Autoencoders trained, broken off, resumed, exported, and used by what is trained on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genscale.autoencoders.kl_network import TrainedKL
from genscale.autoencoders.msvq import MSVQ
from genscale.cli.reconstructing import reconstructs
from genscale.data.digits import Digits
from genscale.io.images import from_uint8
from genscale.io.weights import read_checkpoint
from genscale.runs import RunFolder, read_jsonl
from genscale.training.autoencoder_run import (
    count_flops,
    load_autoencoder,
    reconstruct,
    trains_autoencoder,
)
from scripts.check_exactness import differences, largest_difference

TINY = (
    *("data=digits", "data.resolution=8", "batch_size=8", "trainer.max_steps=12"),
    *("model.hidden_size=8", "model.channel_multipliers=[1,1,1]", "model.norm_groups=4"),
    *("callbacks.log_every=1", "callbacks.checkpoint_every=5", "callbacks.sample_every=6"),
    *("callbacks.sample_count=8", "callbacks.metrics_every=6", "callbacks.metrics_samples=20"),
)
VQ = ("model=msvq", "model.vocab_size=16", "model.latent_channels=4", "objective.warmup_steps=4")
RIVAL = (
    *("objective.adversarial_weight=0.1", "objective.adversarial_start=6"),
    *("objective.discriminator_size=4", "objective.discriminator_layers=2"),
)
KL_SMALL = ("model=kl_small", "model.latent_channels=2")


def stop_at(step: int, command: Any, *words: str) -> None:
    """Train, and break off without any farewell after ``step`` optimizer steps."""
    from genscale.training.callbacks.ema import UpdateEMA

    class PowerCut(BaseException):
        pass

    before = UpdateEMA.on_step

    def on_step(self: Any, trainer: Any, module: Any) -> None:
        if module.step > step:
            raise PowerCut
        before(self, trainer, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UpdateEMA, "on_step", on_step)
        with pytest.raises(PowerCut):
            command("train", *words)


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer's run of 12 steps."""
    import os

    from genscale.cli.app import main

    folder = tmp_path_factory.mktemp("tokenizer") / "run"
    words = (*VQ, *TINY, f"run_dir={folder}", f"paths.outputs={folder.parent}")
    assert main("train", "genscale.cli.train:run", argv=list(words)) == 0
    os.environ.pop("GENSCALE_RUN_DIR", None)
    return folder


class TestResume:
    """A run broken off and resumed ends with the bits of one left alone."""

    @pytest.mark.parametrize(
        "words",
        [
            (*VQ, *RIVAL, "objective.adversarial_adaptive=true"),
            (
                *(*VQ, "trainer.accumulate_grad_batches=2", "objective.entropy_weight=0.1"),
                *("objective.codebook.learned_by=gradient", "model.dropout=0.1"),
            ),
            (*KL_SMALL, *RIVAL),
        ],
        ids=["averaged codes and a rival", "codes by gradient, accumulated", "KL"],
    )
    def test_bit_for_bit(self, command: Any, tmp_path: Path, words: tuple[str, ...]) -> None:
        options = (*words, *TINY, f"paths.outputs={tmp_path}")
        answer = command("train", *options, f"run_dir={tmp_path}/whole")
        assert answer.status == 0, answer.err
        # past the start of codes and rival; three steps are lost
        stop_at(8, command, *options, f"run_dir={tmp_path}/broken")
        assert max(RunFolder(tmp_path / "broken").checkpoints()) == 5
        answer = command("train", *options, f"run_dir={tmp_path}/broken", "resume=latest")
        assert answer.status == 0, answer.err
        assert differences(tmp_path / "whole", tmp_path / "broken") == []
        rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken")]
        losses = [[(r["step"], r["train/loss"]) for r in run if "train/loss" in r] for run in rows]
        assert losses[0] == losses[1]
        assert [step for step, _ in losses[0]] == list(range(1, 13))


class TestTokenizerRun:
    def test_its_export_gives_the_tokens_of_its_average(self, tokenizer_run: Path) -> None:
        network, origin = load_autoencoder(tokenizer_run, device="cpu")
        assert (origin.step, origin.weights) == (12, "ema_0.998")
        exported = MSVQ.from_pretrained(tokenizer_run / "export").eval()
        images = from_uint8(Digits("heldout", 8).images(range(20)))
        assert torch.equal(exported.tokens(images), network.tokens(images))
        assert torch.equal(reconstruct(exported, images), reconstruct(network, images))
        # the statistic of use went along
        assert float(exported.quantizer.hits.sum()) > 0

    def test_the_raw_weights_are_others(self, tokenizer_run: Path) -> None:
        states = [
            load_autoencoder(tokenizer_run, weights=w, device="cpu")[0].state_dict()
            for w in ("ema", "raw")
        ]
        assert largest_difference(*states) > 1e-4

    def test_weights_lie_in_a_checkpoint_once(self, tokenizer_run: Path) -> None:
        state = read_checkpoint(RunFolder(tokenizer_run).checkpoint())["state_dict"]
        prefixes = {name.split(".")[0] for name in state}
        assert prefixes == {"model", "ema", "trainable"}
        own = {name for name in state if name.startswith("trainable.")}
        assert own == {f"trainable.keeper.{name}" for name in ("updates", "sizes", "sums")}

    def test_it_is_logged_and_shown(self, tokenizer_run: Path) -> None:
        rows = read_jsonl(tokenizer_run / "metrics.jsonl")
        last = [row for row in rows if "train/loss" in row][-1]
        assert {"train/usage/1x1", "train/usage/2x2", "train/loss_vq", "train/psnr"} <= set(last)
        assert [row["step"] for row in rows if "eval/psnr" in row] == [6, 12]
        assert sorted(p.name for p in (tokenizer_run / "samples").glob("step-*.png")) == [
            "step-00000006.png",
            "step-00000012.png",
        ]
        page = (tokenizer_run / "report.html").read_text()
        assert "share of the codebook in use, by scale" in page
        assert "The same pictures at every step" in page

    def test_it_is_evaluated(self, tokenizer_run: Path, command: Any, tmp_path: Path) -> None:
        assert trains_autoencoder(RunFolder(tokenizer_run).config())
        answer = command("evaluate", f"run={tokenizer_run}", f"out_dir={tmp_path}", "device=cpu")
        assert answer.status == 0, answer.err
        record = json.loads((tmp_path / "metrics.json").read_text())
        found = {row["name"]: row for row in record["metrics"]}
        assert set(found) == {"psnr", "ssim", "codes_used"}
        assert record["num_samples"] == 360
        details = found["codes_used"]["details"]
        assert details["of"] == 16
        assert max(details["scale_1x1"], details["scale_2x2"]) <= found["codes_used"]["value"] <= 16
        protocol = record["protocols"][found["psnr"]["protocol"]]
        assert (protocol["reference"], protocol["weights"]) == ("digits-8-heldout", "ema_0.998")
        # in other batches, the same numbers
        again = command("evaluate", f"run={tokenizer_run}", f"out_dir={tmp_path}/b", "batch_size=7")
        assert again.status == 0, again.err
        other = json.loads((tmp_path / "b" / "metrics.json").read_text())
        assert other["metrics"][0]["value"] == pytest.approx(found["psnr"]["value"], abs=1e-3)

    @pytest.mark.parametrize(("form", "file"), [("npz", "samples.npz"), ("png", "00004.png")])
    def test_samples_are_reconstructions(
        self, tokenizer_run: Path, command: Any, tmp_path: Path, form: str, file: str
    ) -> None:
        words = (f"run={tokenizer_run}", f"out_dir={tmp_path}", "num_samples=5", f"format={form}")
        answer = command("sample", *words)
        assert answer.status == 0, answer.err
        assert "5 held-out pictures and their reconstructions" in answer.out
        assert (tmp_path / "grid.png").is_file()
        assert (tmp_path / file).is_file()

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("guidance.scale=2",), "guidance=... was given, but run="),
            (("sampler=ddim",), "sampler=... was given, but run="),
            (("num_samples=361",), "'digits' has 360 pictures to reconstruct (heldout)"),
        ],
    )
    def test_what_has_no_meaning_is_refused(
        self, tokenizer_run: Path, command: Any, words: tuple[str, ...], sentence: str
    ) -> None:
        answer = command("sample", f"run={tokenizer_run}", *words)
        assert answer.status == 1
        assert sentence in answer.err


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("model=msvq", "objective=flow"), "Give objective=reconstruction."),
            (("model=kl_small", "objective=reconstruction"), "Give model=msvq"),
            (("model=dimr", "objective=reconstruction"), "DiMR is none. Give model=msvq"),
            (("model=msvq", "autoencoder=sd_vae"), "learns from pixels"),
            (("model=msvq", "sampler=ddim"), "MSVQ is not sampled from"),
            (("model=msvq", "compile=true"), "compile=true is not known"),
            (("model=msvq", "trainer.precision=16-mixed"), "needs a gradient scaler"),
            (("model=msvq", "objective.pixel=l3"), "objective.pixel must be one of l1, l2, both"),
            (("model=msvq", "data.resolution=18"), "does not divide by"),
            (
                (
                    "model=msvq",
                    "objective.adversarial_weight=1",
                    "objective.discriminator_layers=5",
                ),
                "needs pictures of 32 pixels a side",
            ),
            (
                ("model=dimr", "autoencoder=kl_small", "data.resolution=16"),
                "autoencoder.run is not set. Train one with: python train.py model=kl_small",
            ),
        ],
    )
    def test_with_a_sentence(
        self, command: Any, tmp_path: Path, words: tuple[str, ...], sentence: str
    ) -> None:
        answer = command("train", *words, f"paths.outputs={tmp_path}")
        assert answer.status == 1, answer.out
        assert sentence in answer.err
        assert "Traceback" not in answer.err


def test_a_latent_model_on_a_kl_autoencoder(command: Any, tmp_path: Path) -> None:
    """Latents of the run have mean 0 and deviation 1, and DiMR trains and samples on them."""
    outputs = f"paths.outputs={tmp_path}"
    answer = command("train", *KL_SMALL, *TINY, f"run_dir={tmp_path}/kl", outputs)
    assert answer.status == 0, answer.err
    answer = command("export", f"run={tmp_path}/kl")
    assert f"is {tmp_path}/kl/export already" in answer.err
    trained = TrainedKL(run=str(tmp_path / "kl"), latent_channels=2)
    images = from_uint8(Digits("train", 8).images(range(1437)))
    with torch.no_grad():
        latents = trained.encode(images).double()
        network, _ = load_autoencoder(tmp_path / "kl", device="cpu")
        assert (
            float((reconstruct(trained, images) - reconstruct(network, images)).abs().max()) < 1e-5
        )
    assert float(latents.mean()) == pytest.approx(0, abs=1e-4)
    assert float(latents.std()) == pytest.approx(1, abs=1e-4)
    answer = command(
        "train",
        *("model=dimr", "debug=smoke", "data.resolution=8", "batch_size=8", "sampler.steps=2"),
        *("model.hidden_sizes=[16,8]", "model.depths=[1,1]", "model.num_heads=2"),
        *("model.patch_sizes=[2,1]", "autoencoder=kl_small", f"autoencoder.run={tmp_path}/kl"),
        *("autoencoder.latent_channels=2", f"run_dir={tmp_path}/dimr", outputs),
    )
    assert answer.status == 0, answer.err
    answer = command("sample", f"run={tmp_path}/dimr", "num_samples=4", f"out_dir={tmp_path}/out")
    assert answer.status == 0, answer.err


def test_operations_are_those_of_encoding_and_decoding() -> None:
    network = MSVQ(
        scales=[1, 2],
        vocab_size=4,
        latent_channels=2,
        image_channels=1,
        hidden_size=4,
        channel_multipliers=(1,),
        num_blocks=1,
        norm_groups=2,
        attention_levels=(),
        middle_attention=False,
        phi_weight=0.0,
    )
    found = count_flops(network, 1, 2)
    cells, wide = 2 * 2, 2 * 4 * 4 * 9  # operations of a 4 -> 4 convolution, a cell
    encoder = 2 * 1 * 4 * 9 + 6 * wide + 2 * 4 * 2 * 9
    assert found["encoder"] == cells * encoder


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_train_as_one(
    command: Any, tmp_path: Path, subprocess_environment: dict[str, str], repository: Path
) -> None:
    import subprocess
    import sys

    words = (*VQ, *RIVAL, *TINY, "trainer.gradient_clip_val=null", f"paths.outputs={tmp_path}")
    assert command("train", *words, f"run_dir={tmp_path}/one").status == 0
    two = (
        *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"),
        *("trainer.precision=32-true", "trainer.max_steps=12", f"run_dir={tmp_path}/two"),
    )
    subprocess_environment.pop("GENSCALE_RUN_DIR", None)
    done = subprocess.run(
        [sys.executable, str(repository / "train.py"), *words, *two],
        env=subprocess_environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    states = [
        read_checkpoint(RunFolder(tmp_path / name).checkpoint(12))["state_dict"]
        for name in ("one", "two")
    ]
    assert largest_difference(*states) <= 1e-4  # measured: 6e-6


def test_a_run_of_a_backbone_is_none_of_an_autoencoder(trained_run: Path) -> None:
    from omegaconf import OmegaConf

    assert not trains_autoencoder(RunFolder(trained_run).config())
    assert not reconstructs(OmegaConf.create({"run": str(trained_run)}))
