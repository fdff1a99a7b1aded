"""The pipeline: loading runs and exported folders, and generating from Python."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from genscale import GenerationPipeline, rng
from genscale.autoencoders.base import Autoencoder
from genscale.autoencoders.identity import Identity
from genscale.autoencoders.offload import OffloadedDecoder
from genscale.backbones.dimr import DiMR
from genscale.conditioning.base import Conditioning
from genscale.errors import CheckpointError, ConfigError, DataError
from genscale.guidance.base import Unguided
from genscale.guidance.cfg import ClassifierFree
from genscale.objectives.flow import FlowMatching
from genscale.pipeline import choose_device
from genscale.samplers.ode import Euler, Heun


@pytest.fixture(scope="module")
def pipeline(trained_run: Path) -> GenerationPipeline:
    return GenerationPipeline.from_run(trained_run, device="cpu")


@pytest.fixture
def run_copy(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def change_config(run: Path, change: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


class TestGenerate:
    def test_pictures_are_uint8_in_the_order_asked_for(self, pipeline: GenerationPipeline) -> None:
        images = pipeline.generate(num_samples=7, labels=[3, 7], seed=0, batch_size=3)
        assert images.dtype == torch.uint8
        assert images.shape == (7, *pipeline.image_shape) == (7, 1, 8, 8)

    def test_a_longer_set_begins_with_the_shorter_one(self, pipeline: GenerationPipeline) -> None:
        long = pipeline.generate(num_samples=9, labels="random", seed=2)
        short = pipeline.generate(num_samples=4, labels="random", seed=2)
        assert int((long[:4].int() - short.int()).abs().max()) <= 1

    def test_another_seed_gives_other_samples(self, pipeline: GenerationPipeline) -> None:
        sets = [pipeline.generate(num_samples=4, seed=seed) for seed in (0, 1)]
        assert not torch.equal(*sets)

    def test_torch_generator_plays_no_part(self, pipeline: GenerationPipeline) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = pipeline.generate(num_samples=2)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(99)
        assert torch.equal(pipeline.generate(num_samples=2), first)

    def test_a_stream_tells_ids_labels_and_evaluations(self, pipeline: GenerationPipeline) -> None:
        batches = list(
            pipeline.stream(
                num_samples=5,
                batch_size=2,
                sampler=Heun(steps=2),
                guidance=ClassifierFree(scale=2.0),
            )
        )
        assert [batch.ids.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
        assert [batch.labels.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]  # type: ignore[union-attr]
        # Heun: 2 n - 1 evaluations of two branches each
        assert {float(n) for batch in batches for n in batch.nfe} == {6.0}

    def test_numbers_below_one_are_refused(self, pipeline: GenerationPipeline) -> None:
        with pytest.raises(ConfigError, match="must be positive, but 0 and 64 were given"):
            pipeline.generate(num_samples=0)

    def test_an_unconditional_model_takes_no_labels(self) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_sizes": [8], "depths": [1], "patch_sizes": [2], "num_heads": 2}
        unconditional = GenerationPipeline(
            model=DiMR(input_size=8, in_channels=1, num_classes=0, kernel_sizes=3, **sizes).eval(),
            autoencoder=Identity(latent_channels=1),
            objective=FlowMatching(),
            sampler=Euler(steps=2),
            guidance=Unguided(),
        )
        (batch,) = unconditional.stream(num_samples=2)
        assert batch.labels is None
        with pytest.raises(ConfigError, match="the model is unconditional"):
            unconditional.generate(num_samples=2, labels=[1])

    def test_a_diverged_model_is_told_as_such(self, trained_run: Path) -> None:
        broken = GenerationPipeline.from_run(trained_run, device="cpu")
        with torch.no_grad():
            for parameter in broken.model.parameters():
                parameter.fill_(float("nan"))
        with pytest.raises(DataError, match="The model diverged"):
            broken.generate(num_samples=1)


class TestPrecision:
    def test_bfloat16_is_near_float32_and_not_equal(self, trained_run: Path) -> None:
        pipeline = GenerationPipeline.from_run(trained_run, device="cpu")
        cond, seeds = Conditioning(labels=torch.arange(4)), rng.sample_seeds(0, 0, 4)
        exact, _ = pipeline.sample(cond, seeds)
        pipeline.set_precision("bfloat16")
        rough, _ = pipeline.sample(cond, seeds)
        assert rough.dtype == torch.float32
        difference = float((rough - exact).abs().max())
        assert 0 < difference < 0.2  # bfloat16 has 8 bits: 0.4 % a rounding, a few of them

    def test_other_precisions_are_refused(self, pipeline: GenerationPipeline) -> None:
        with pytest.raises(ConfigError, match="float32 or bfloat16, but 'float16'"):
            pipeline.set_precision("float16")


class TestDevices:
    def test_what_is_there_is_chosen(self) -> None:
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert choose_device(None).type == expected
        assert choose_device("cpu") == torch.device("cpu")

    def test_what_is_not_there_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match=r"device=cuda was given, but no CUDA device is pre"):
            choose_device("cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert choose_device("cuda:1") == torch.device("cuda:1")
        with pytest.raises(ConfigError, match=r"CUDA devices 0 to 1 are present.*device=cuda:0"):
            choose_device("cuda:2")
        with pytest.raises(ConfigError, match="device=gpu0 is no device"):
            choose_device("gpu0")


class Moving(Autoencoder):
    """Notes when it is moved; its weights come with the first use where ``lazy``."""

    latent_channels, downsample = 1, 1

    def __init__(self, *, lazy: bool) -> None:
        super().__init__()
        self.events: list[str] = []
        self.inner: nn.Module | None = None if lazy else nn.Conv2d(1, 1, 1)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.events.append("moved")
        return super()._apply(fn, recurse)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        self.events.append(f"decoded on {latents.device.type}")
        self.inner = (self.inner or nn.Conv2d(1, 1, 1)).to(latents.device)
        self.weights_were_on = next(self.inner.parameters()).device.type
        return self.inner(latents)


class TestOffload:
    @pytest.mark.parametrize("lazy", [False, True])
    def test_the_autoencoder_moves_for_every_decoding(self, lazy: bool) -> None:
        torch.manual_seed(0)
        autoencoder = Moving(lazy=lazy)
        # a name of the CPU that accelerate takes for another device
        decoder = OffloadedDecoder(autoencoder, torch.device("cpu:0"))
        latents = torch.ones(1, 1, 2, 2)
        first = decoder.decode(latents)
        autoencoder.events.clear()
        assert torch.equal(decoder.decode(latents), first)
        assert autoencoder.events == ["moved", "decoded on cpu", "moved"]

    def test_samples_stay_the_same(self, trained_run: Path) -> None:
        pipeline = GenerationPipeline.from_run(trained_run, device="cpu")
        torch.manual_seed(0)
        pipeline.autoencoder = Moving(lazy=False)
        expected = pipeline.generate(num_samples=2)
        assert torch.equal(pipeline.offload().generate(num_samples=2), expected)
        assert torch.equal(pipeline.to("cpu").generate(num_samples=2), expected)

    @pytest.mark.gpu
    def test_its_weights_are_on_the_device_only_while_it_works(self, trained_run: Path) -> None:
        pipeline = GenerationPipeline.from_run(trained_run, device="cuda")
        autoencoder = Moving(lazy=False)
        pipeline.autoencoder = autoencoder
        pipeline.offload().generate(num_samples=2)
        assert autoencoder.weights_were_on == "cuda"
        assert {p.device.type for p in autoencoder.parameters()} == {"cpu"}

    def test_the_package_is_asked_for_in_words(
        self, pipeline: GenerationPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "accelerate", None)
        with pytest.raises(ImportError, match=r"offload=true needs .*pip install .genscale\[offl"):
            pipeline.offload()

    def test_it_is_a_setting_of_sampling(self, trained_run: Path, command: Any) -> None:
        words = (f"run={trained_run}", "num_samples=2", "offload=true")
        assert command("sample", *words).status == 0


class TestLoading:
    def test_a_file_of_another_depth_says_so(self, run_copy: Path) -> None:
        checkpoint = next((run_copy / "checkpoints").glob("*.ckpt"))
        change_config(run_copy, lambda config: config["model"].update(depths=[5, 1]))
        with pytest.raises(
            CheckpointError,
            match=r"The file looks like depth 1 of stages\.0\.blocks, the config says 5",
        ):
            GenerationPipeline.from_run(run_copy, checkpoint=checkpoint)

    def test_the_run_decides_what_is_built(self, pipeline: GenerationPipeline) -> None:
        assert isinstance(pipeline.model, DiMR)
        assert not pipeline.model.training
        assert pipeline.num_classes == 10
        assert pipeline.sampler.num_steps == 3
        assert pipeline.device.type == "cpu"

    def test_an_exported_folder_is_complete(self, trained_run: Path, tmp_path: Path) -> None:
        shutil.copytree(trained_run / "export", tmp_path / "moved")
        ours = GenerationPipeline.from_pretrained(tmp_path / "moved", "cpu")
        run = GenerationPipeline.from_run(trained_run, device="cpu")
        assert torch.equal(ours.generate(num_samples=3), run.generate(num_samples=3))
        names = {path.name for path in (tmp_path / "moved" / "model").iterdir()}
        assert names == {"config.json", "diffusion_pytorch_model.safetensors"}  # diffusers' layout
        model = DiMR.from_pretrained(tmp_path / "moved" / "model")
        assert all(
            torch.equal(value, run.model.state_dict()[name])
            for name, value in model.state_dict().items()
        )

    def test_saving_twice_gives_the_same(
        self, pipeline: GenerationPipeline, tmp_path: Path
    ) -> None:
        config = {key: {} for key in ("model", "autoencoder", "objective", "sampler", "guidance")}
        for name in ("a", "b"):
            pipeline.save_pretrained(tmp_path / name, {**config, "data_info": {}, "secret": 1})
        files = [
            [(p.name, p.read_bytes()) for p in sorted((tmp_path / name).rglob("*.*"))]
            for name in ("a", "b")
        ]
        assert files[0] == files[1]
        assert "secret" not in (tmp_path / "a" / "genscale.json").read_text()

    def test_what_is_no_exported_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is no exported folder"):
            GenerationPipeline.from_pretrained(tmp_path)

    def test_an_export_without_its_weights_is_refused(
        self, trained_run: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(trained_run / "export", tmp_path / "half")
        (tmp_path / "half" / "model" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="No weight file at"):
            GenerationPipeline.from_pretrained(tmp_path / "half")

    def test_a_damaged_export_is_refused(self, trained_run: Path, tmp_path: Path) -> None:
        shutil.copytree(trained_run / "export", tmp_path / "half")
        (tmp_path / "half" / "genscale.json").write_text('{"model": ')
        with pytest.raises(CheckpointError, match=r"genscale\.json is damaged"):
            GenerationPipeline.from_pretrained(tmp_path / "half")
        (tmp_path / "half" / "genscale.json").write_text(json.dumps({"model": {}}))
        with pytest.raises(ConfigError, match=r"'model' names no _target_"):
            GenerationPipeline.from_pretrained(tmp_path / "half")

    def test_foreign_code_is_not_called(self, run_copy: Path) -> None:
        def change(config: dict[str, Any]) -> None:
            config["sampler"] = {"_target_": "os.mkdir", "path": str(run_copy / "sprung")}

        change_config(run_copy, change)
        with pytest.raises(ConfigError, match=r"must lie in genscale, but os\.mkdir was given"):
            GenerationPipeline.from_run(run_copy)
        assert not (run_copy / "sprung").exists()

    def test_a_config_without_a_part_is_refused(self, run_copy: Path) -> None:
        change_config(run_copy, lambda config: config.pop("objective"))
        with pytest.raises(ConfigError, match="'objective' names no _target_"):
            GenerationPipeline.from_run(run_copy)

    def test_a_file_of_something_else_is_refused(self, run_copy: Path) -> None:
        file = run_copy / "other.ckpt"
        torch.save({"weights": {}}, file)
        with pytest.raises(CheckpointError, match="holds no state_dict"):
            GenerationPipeline.from_run(run_copy, checkpoint=file)
