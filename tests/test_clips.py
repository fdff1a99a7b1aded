"""Clips through the pipeline: shapes, frame rates, autoencoders of pictures, searches, reports."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from genscale import rng
from genscale.autoencoders.base import Autoencoder
from genscale.autoencoders.frames import by_frame, on_clips
from genscale.autoencoders.identity import Identity
from genscale.backbones.base import Backbone, BackboneOutput, register_to_config
from genscale.cli.combinations import frame_problems
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.evaluation import clip_protocol
from genscale.generated import Generated
from genscale.guidance.cfg import ClassifierFree
from genscale.io.video import save_overview
from genscale.loading import facts_of
from genscale.objectives.flow import FlowMatching
from genscale.pipeline import GenerationPipeline
from genscale.report import pictures
from genscale.rewards.callable import FunctionReward
from genscale.sample_conditions import check_frame_rate, sample_conditions
from genscale.samplers.ode import Euler
from genscale.search.best_of_n import BestOfN
from genscale.search.setup import SearchSetup


class TinyClips(Backbone):
    """One convolution in space and time, moved by class, frame rate and size."""

    @register_to_config
    def __init__(
        self,
        *,
        input_size: tuple[int, int, int] = (3, 4, 6),
        in_channels: int = 2,
        num_classes: int = 3,
        reads_size: bool = False,
    ) -> None:
        super().__init__()
        self.mix = nn.Conv3d(in_channels, in_channels, 3, padding=1)
        self.classes = nn.Embedding(num_classes + 1, in_channels)
        self.seen: list[Conditioning] = []

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None
    ) -> BackboneOutput:
        self.seen.append(cond)
        moved = self.classes(cond.labels % self.classes.num_embeddings)
        if cond.frame_rate is not None:
            moved = moved + 1 / cond.frame_rate[:, None]
        return BackboneOutput(self.mix(x) + moved[:, :, None, None, None])


class Doubling(Autoencoder):
    """A decoder of pictures: every latent becomes four pixels of three channels."""

    latent_channels, downsample, image_channels = 2, 2, 3

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return images[:, :2, ::2, ::2]

    def decode(self, latents: Tensor) -> Tensor:
        assert latents.dim() == 4
        grey = latents.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        return grey.repeat_interleave(2, 2).repeat_interleave(2, 3).clamp(-1, 1)


class WholeClips(Doubling):
    """A decoder of clips: two frames of a latent one."""

    temporal_downsample = 2

    def latent_to_frames(self, latent_frames: int) -> int:
        return 2 * latent_frames

    def decode(self, latents: Tensor) -> Tensor:
        assert latents.dim() == 5
        return by_frame(super().decode, latents).repeat_interleave(2, 2)


def clips_pipeline(
    autoencoder: Autoencoder | None = None, frame_rate: float | None = 8.0, **settings: Any
) -> GenerationPipeline:
    torch.manual_seed(0)
    return GenerationPipeline(
        model=TinyClips(**settings).eval(),
        autoencoder=autoencoder or Doubling(),
        objective=FlowMatching(),
        sampler=Euler(steps=2),
        guidance=ClassifierFree(scale=2.0),
        num_classes=3,
        frame_rate=frame_rate,
    )


class TestShapes:
    @pytest.mark.parametrize(
        ("autoencoder", "shape"),
        [
            (Identity(latent_channels=2), (2, 3, 4, 6)),
            (Doubling(), (3, 3, 8, 12)),
            (WholeClips(), (3, 6, 8, 12)),
        ],
    )
    def test_samples_have_the_shape_that_is_told(
        self, autoencoder: Autoencoder, shape: tuple[int, ...]
    ) -> None:
        pipeline = clips_pipeline(autoencoder)
        assert pipeline.makes_clips
        assert pipeline.image_shape == shape
        assert pipeline.generate(num_samples=2).shape == (2, *shape)

    def test_a_clip_is_a_function_of_its_seed(self) -> None:
        pipeline = clips_pipeline()
        whole = pipeline.generate(num_samples=5, labels=[2, 0], seed=3, batch_size=5)
        parts = list(pipeline.stream(num_samples=5, labels=[2, 0], seed=3, batch_size=2))
        assert all(isinstance(part, Generated) for part in parts)
        joined = torch.cat([part.images for part in parts])
        assert int((whole.int() - joined.int()).abs().max()) <= 1
        assert not torch.equal(whole[0], whole[1])

    def test_decoders_of_pictures_see_one_frame_after_the_other(self) -> None:
        clips = torch.randn(2, 2, 5, 4, 4)
        autoencoder = Doubling()
        made = on_clips(autoencoder, autoencoder.decode, clips)
        assert made.shape == (2, 3, 5, 8, 8)
        for number in range(5):
            assert torch.equal(made[:, :, number], autoencoder.decode(clips[:, :, number]))
        assert torch.equal(by_frame(torch.neg, clips[:, :, 0]), -clips[:, :, 0])


class TestConditions:
    def test_the_network_is_told_rate_and_size(self) -> None:
        pipeline = clips_pipeline(reads_size=True)
        pipeline.generate(num_samples=2, labels=[1])
        (cond, *_) = pipeline.model.seen
        # both branches of guidance keep what describes the clip
        assert cond.frame_rate is not None
        assert cond.frame_rate.tolist() == [8.0] * 4
        assert cond.size is not None
        assert cond.size.tolist() == [[8.0, 12.0]] * 4

    def test_other_rates_make_other_clips(self) -> None:
        pipeline = clips_pipeline()
        usual, slow, still = (
            pipeline.generate(num_samples=1, frame_rate=rate) for rate in (None, 2.0, float("inf"))
        )
        assert torch.equal(usual, pipeline.generate(num_samples=1, frame_rate=8.0))
        assert not torch.equal(usual, slow)
        assert not torch.equal(usual, still)
        pipeline.frame_rate = 2.0
        assert torch.equal(pipeline.generate(num_samples=1), slow)

    def test_without_a_rate_none_is_told(self) -> None:
        assert clips_pipeline(frame_rate=None).conditions(2).frame_rate is None

    def test_rates_are_numbers_above_0_of_clips(self) -> None:
        check_frame_rate(0.5, clips=True)
        for wrong in (0, -1.0, float("nan"), "fast", True):
            with pytest.raises(ConfigError, match="frame_rate must be a number above 0"):
                check_frame_rate(wrong, clips=True)
        with pytest.raises(ConfigError, match="frame_rate=8 was given, but the samples are pict"):
            check_frame_rate(8, clips=False)
        with pytest.raises(ConfigError, match="above 0"):
            sample_conditions(TinyClips(), 2, frame_rate=0.0)

    def test_what_a_run_says_of_its_data(self) -> None:
        facts = facts_of({"num_classes": 3, "frame_rate": 12})
        assert facts["frame_rate"] == 12.0
        assert facts_of({})["frame_rate"] is None


class TestSearch:
    def test_rewards_see_clips_between_0_and_1(self) -> None:
        seen: list[Tensor] = []

        def motion(clips: Tensor, requests: Any) -> Tensor:
            seen.append(clips)
            return (clips[:, :, 1:] - clips[:, :, :-1]).abs().mean((1, 2, 3, 4))

        pipeline = clips_pipeline()
        setup = SearchSetup(search=BestOfN(4), reward=FunctionReward(motion, clips=True))
        cond = pipeline.conditions(2, labels=torch.tensor([0, 1]))
        seeds = rng.sample_seeds(0, 0, 2)
        found = pipeline.search(cond, seeds, setup)
        assert found.images.shape == (2, 3, 3, 8, 12)
        assert {tuple(clips.shape[1:]) for clips in seen} == {(3, 3, 8, 12)}
        assert all(0 <= float(c.min()) <= float(c.max()) <= 1 for c in seen)
        plain, _ = pipeline.sample(cond, seeds)
        before = motion((plain * 0.5 + 0.5).clamp(0, 1), None)
        assert bool((found.rewards["reward"] >= before.double() - 1e-6).all())

    def test_other_rewards_are_refused(self) -> None:
        pipeline = clips_pipeline()
        setup = SearchSetup(search=BestOfN(2), reward=FunctionReward(lambda x, r: x[:, 0, 0, 0]))
        with pytest.raises(ConfigError, match="judges pictures, but the model makes clips"):
            pipeline.search(
                pipeline.conditions(1, labels=torch.tensor([0])), rng.sample_seeds(0, 0, 1), setup
            )
        films = SearchSetup(search=BestOfN(2), reward=FunctionReward(lambda x, r: x, clips=True))
        (sentence,) = films.problems(Euler(steps=2))
        assert "judges clips, but the model makes pictures" in sentence


def test_protocols_say_what_the_clips_were() -> None:
    clips = clip_protocol((3, 16, 36, 64), 12.0)
    assert clips is not None
    assert (clips.frames, clips.frame_rate, clips.size) == (16, 12.0, "36x64")
    still = clip_protocol((3, 16, 36, 64), float("inf"))
    assert still is not None
    assert still.frame_rate == 0.0
    assert clip_protocol((3, 36, 64), None) is None


@pytest.mark.parametrize(
    ("size", "frames", "sentence"),
    [
        (32, 0, None),
        ([32, 32], 0, None),
        ([8, 32, 32], 8, None),
        (["${data.num_frames}", 32, 32], 8, None),
        ([8, 32, 32], 0, "Net makes clips, but data 'some' holds pictures"),
        (32, 8, "Data 'some' holds clips of 8 frames, but Net makes pictures"),
        ([4, 32, 32], 8, "begins with 4 frames, but the clips of data 'some' have 8"),
    ],
)
def test_models_meet_data_of_their_kind(size: Any, frames: int, sentence: str | None) -> None:
    model = OmegaConf.create({"_target_": "some.Net", "input_size": size})
    found = frame_problems(model, SimpleNamespace(name="some", num_frames=frames))
    assert len(found) == (sentence is not None)
    if sentence is not None:
        assert sentence in found[0]
    if sentence and "begins" in sentence:  # latents may have fewer frames
        data = SimpleNamespace(name="some", num_frames=frames)
        assert frame_problems(model, data, in_latents=True) == []


class TestReports:
    def figure(self, path: Path) -> str:
        return str(pictures.picture(path, "caption", alt="samples"))

    def test_what_plays_stands_before_the_sheet(self, tmp_path: Path) -> None:
        clips = torch.randint(256, (2, 3, 4, 8, 8), dtype=torch.uint8)
        save_overview(clips, tmp_path / "grid.png")
        page = self.figure(tmp_path / "grid.png")
        assert page.count("<img") == 2
        assert page.index("data:image/webp") < page.index("data:image/png")
        assert 'alt="samples, playing"' in page

    def test_large_and_damaged_films_are_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clips = torch.randint(256, (2, 3, 4, 8, 8), dtype=torch.uint8)
        save_overview(clips, tmp_path / "grid.png")
        monkeypatch.setattr(pictures, "MAX_PLAYED", 10)
        page = self.figure(tmp_path / "grid.png")
        assert "grid.webp plays the clips" in page
        assert page.count("<img") == 1
        monkeypatch.undo()
        (tmp_path / "grid.webp").write_bytes(b"no film")
        page = self.figure(tmp_path / "grid.png")
        assert "grid.webp is damaged" in page
        assert page.count("data:image/png") == 1
