"""Samples of another size than the trained one, from Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from genscale.autoencoders.identity import Identity
from genscale.autoencoders.msvq import MSVQ
from genscale.backbones.dit import DiT
from genscale.backbones.fit import FIT
from genscale.backbones.var import VAR
from genscale.cascade import BaseSamples, ReducedData, Wanted
from genscale.conditioning.low_resolution import LowResolution
from genscale.data.base import TensorImages
from genscale.data.scenes.dataset import Scenes
from genscale.errors import ConfigError
from genscale.evaluation import describe
from genscale.guidance.autoguidance import Autoguidance, WeakSettings
from genscale.guidance.base import Unguided
from genscale.guidance.cfg import ClassifierFree
from genscale.guidance.scale_wise import ScaleGuidance
from genscale.io.images import from_uint8
from genscale.objectives.edm import EDM
from genscale.objectives.flow import FlowMatching
from genscale.objectives.next_scale import NextScale as NextScaleObjective
from genscale.pipeline import GenerationPipeline
from genscale.resolution import preset_named
from genscale.rewards.callable import FunctionReward
from genscale.samplers.next_scale import NextScale
from genscale.samplers.ode import Euler
from genscale.search.best_of_n import BestOfN
from genscale.search.setup import SearchSetup
from genscale.sizes import as_size, shape_at, size_hint
from genscale.weak_models import WeakModel


def awake(network: Any) -> Any:
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def dit(depth: int = 1) -> DiT:
    network: DiT = awake(
        DiT(
            input_size=8, in_channels=1, num_classes=3, hidden_size=16, depth=depth, num_heads=2
        )
    )  # fmt: skip
    return network


def pipeline(**settings: Any) -> GenerationPipeline:
    return GenerationPipeline(
        model=dit(),
        autoencoder=Identity(latent_channels=1),
        objective=FlowMatching(time_input="unit"),
        sampler=Euler(3),
        guidance=ClassifierFree(scale=1.5),
        num_classes=3,
        **settings,
    )


@pytest.mark.parametrize(
    ("given", "sides"), [(64, (64, 64)), ([48, 64], (48, 64)), ((1, 2), (1, 2))]
)
def test_a_side_or_two_are_a_size(given: Any, sides: tuple[int, int]) -> None:
    assert as_size(given) == sides


@pytest.mark.parametrize("given", [0, True, "64", [64], [1, 2, 3], [64, -1], [8.0, 8]])
def test_nothing_else_is_a_size(given: Any) -> None:
    with pytest.raises(ConfigError, match="size must be a side in pixels"):
        as_size(given)


def test_shapes_follow_the_pixels_of_a_cell() -> None:
    network = dit()
    assert shape_at(network, 8, (48, 64)) == (1, 6, 8)
    with pytest.raises(ConfigError, match=r"size=50 .*multiples of 16 .*size=48\.$"):
        shape_at(network, 8, (50, 50))


@pytest.mark.parametrize(
    ("size", "word"),
    [((8, 8), None), ((10, 10), None), ((10, 8), None), ((16, 16), "2 times"),
     ((4, 4), "0.5 times"), ((12, 6), "1.06 times")],
)  # fmt: skip
def test_a_hint_is_given_far_from_the_trained_size(size: Any, word: str | None) -> None:
    hint = size_hint((8, 8), size)
    assert hint is None if word is None else word in (hint or "")


def test_pictures_have_the_size_asked_for() -> None:
    native = pipeline()
    wide = native.at((12, 16))
    assert wide.size == (12, 16)
    assert wide.image_shape == wide.sample_shape == (1, 12, 16)
    assert native.size is None
    images = wide.generate(num_samples=3, seed=1)
    assert images.shape == (3, 1, 12, 16)
    assert torch.equal(native.generate(num_samples=3, seed=1, size=[12, 16]), images)
    # one sample at a time, the same but for rounding
    parts = wide.generate(num_samples=3, seed=1, batch_size=1)
    assert int((parts.int() - images.int()).abs().max()) <= 1
    cond, seeds = native.conditions(2, labels=torch.tensor([0, 1])), torch.tensor([3, 4])
    assert native.sample(cond, seeds, size=16)[0].shape == (2, 1, 16, 16)


def test_the_trained_size_changes_no_bit_and_no_protocol() -> None:
    native, same = pipeline(), pipeline(size=8)
    assert same.size is None
    assert torch.equal(native.generate(num_samples=2), same.generate(num_samples=2))
    settings: dict[str, Any] = {
        "labels": "balanced",
        "num_samples": 2,
        "nfe": 6.0,
        "weights": "ema",
    }
    assert describe(native, **settings) == describe(same, **settings)
    assert describe(pipeline(size=16), **settings).sampler.endswith(", at 16x16")


def test_a_search_judges_pictures_of_the_size() -> None:
    shapes: list[tuple[int, ...]] = []

    def mean(images: Tensor, requests: Any) -> Tensor:
        shapes.append(tuple(images.shape[1:]))
        return images.flatten(1).mean(1)

    wide = pipeline(size=(12, 8))
    setup = SearchSetup(search=BestOfN(3), reward=FunctionReward(mean))
    cond = wide.conditions(2, labels=torch.tensor([0, 1]))
    found = wide.search(cond, torch.tensor([3, 4]), setup)
    assert found.images.shape == (2, 1, 12, 8)
    assert set(shapes) == {(1, 12, 8)}
    plain = wide.sample(cond, torch.tensor([3, 4]))[0]
    assert bool((found.images.flatten(1).mean(1) >= plain.flatten(1).mean(1) - 1e-5).all())
    # operations of the larger grid: 24 tokens, not 16
    small = pipeline().search(cond, torch.tensor([3, 4]), setup)
    assert float(found.cost.flops[0]) > float(small.cost.flops[0])


def test_a_weak_model_works_at_the_size_too() -> None:
    main = pipeline()
    settings = WeakSettings(run=None, checkpoint=None, weights="ema")
    main.weak_models.add(settings, WeakModel(dit(depth=2), main.objective, "mine"))
    main.guidance = main.ready(Autoguidance(scale=2.0))  # at the trained size, once
    assert main.at(16).generate(num_samples=2).shape == (2, 1, 16, 16)
    assert main.generate(num_samples=2).shape == (2, 1, 8, 8)


def test_networks_are_told_of_the_size_and_enlarge_samples_of_it() -> None:
    def fit(side: int, references: int = 0) -> GenerationPipeline:
        network = FIT(
            input_size=side, in_channels=1, num_classes=3, patch_size=[1, 2, 2],
            group_size=[1, 2, 2], patch_width=8, latent_width=8, context_width=8, num_latents=16,
            depth=1, global_depth=1, patch_head_size=4, latent_head_size=4,
            reference_channels=references, reads_size=True,
        )  # fmt: skip
        return GenerationPipeline(
            model=awake(network), autoencoder=Identity(latent_channels=1),
            objective=EDM(sigma_data=1.0, sigma_in=2.0), sampler=Euler(2), guidance=Unguided(),
            num_classes=3,
        )  # fmt: skip

    large = fit(8, references=1)
    low = LowResolution(factor=2, max_level=0.5, level=0.1)
    large.references = BaseSamples(fit(4), large.image_shape, low, name="small run")
    wide = large.at((8, 16))
    assert wide.conditions(2).size.tolist() == [[8.0, 16.0]] * 2  # type: ignore[union-attr]
    assert isinstance(wide.references, BaseSamples)
    assert wide.references.base.image_shape == (1, 4, 8)
    assert wide.generate(num_samples=2).shape == (2, 1, 8, 16)
    assert large.references.base.image_shape == (1, 4, 4)
    scenes = Scenes(2, resolution=32)
    drawn = ReducedData(scenes, low).at((3, 24, 32))
    wanted = Wanted(torch.arange(2), torch.arange(2))
    expected = low.reduced(from_uint8(scenes.images_at([0, 1], (24, 32))))
    assert torch.equal(drawn.pictures(wanted), expected)
    with pytest.raises(ConfigError, match=r"low_resolution\.factor, which does not divide"):
        drawn.at((3, 25, 32))
    digits = TensorImages(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="cannot be had at that size"):
        ReducedData(digits, low).at((1, 16, 16))
    with pytest.raises(ConfigError, match=r"size=12 cannot be made by FIT: .* 9 groups"):
        fit(8).at(12)


def test_scale_wise_models_make_other_sizes() -> None:
    tokens: dict[str, Any] = {"scales": (1, 2, 4), "latent_channels": 4, "vocab_size": 12}
    torch.manual_seed(1)
    msvq = MSVQ(
        **tokens, image_channels=1, hidden_size=8, channel_multipliers=(1, 2), num_blocks=1,
        norm_groups=4,
    )  # fmt: skip
    maker = GenerationPipeline(
        model=awake(VAR(**tokens, num_classes=3, hidden_size=16, depth=1, num_heads=2)),
        autoencoder=msvq.eval(), objective=NextScaleObjective(), sampler=NextScale(num_scales=3),
        guidance=ScaleGuidance(1.5), num_classes=3,
    )  # fmt: skip
    native = maker.generate(num_samples=2)
    assert native.shape == (2, 1, 8, 8)
    assert maker.generate(num_samples=2, size=(12, 8)).shape == (2, 1, 12, 8)
    assert torch.equal(maker.generate(num_samples=2), native)
    maker.resolution = preset_named("pyramid")
    assert maker.generate(num_samples=2, size=(12, 8)).shape == (2, 1, 12, 8)
    assert torch.equal(maker.generate(num_samples=2), native)
    with pytest.raises(ConfigError, match=r"multiples of 2 pixels.* size=8\.$"):
        maker.at(7)


def test_the_command_line_takes_a_size_and_hints(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from genscale.cli.app import main

    def sample(*words: str) -> tuple[int, str]:
        own = [f"run={trained_run}", "num_samples=1", "sampler.steps=1", f"out_dir={tmp_path}"]
        status = main("sample", "genscale.cli.sample:run", argv=[*own, "format=png", *words])
        return status, capsys.readouterr().err

    status, said = sample("size=[8,16]")
    assert status == 0
    assert "hint: size=[8,16] is far from the trained 8" in said
    assert json.loads((tmp_path / "samples.json").read_text())["size"] == [8, 16]
    (picture,) = [file for file in tmp_path.rglob("*.png") if file.name != "grid.png"]
    assert Image.open(picture).size == (16, 8)
    status, said = sample("size=9")
    assert status == 1
    assert "size=9 cannot be made by DiMR: height and width must be multiples of" in said
