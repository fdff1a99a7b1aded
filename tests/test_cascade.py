"""A cascade: a model that enlarges, conditioned on samples of a smaller one or on reduced data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genscale import rng
from genscale.autoencoders.identity import Identity
from genscale.backbones.fit import FIT
from genscale.cascade import BaseSamples, ReducedData, Wanted
from genscale.conditioning.low_resolution import LowResolution
from genscale.data.base import TensorImages
from genscale.errors import ConfigError, DataError
from genscale.guidance.base import Unguided
from genscale.io.images import from_uint8, to_uint8
from genscale.objectives.edm import EDM
from genscale.pipeline import GenerationPipeline
from genscale.samplers.ode import Euler
from genscale.training.ema import ConstantEMA
from genscale.training.lamb import Lamb
from genscale.training.lr_schedule import Constant
from genscale.training.module import GenerativeModule

LOW = LowResolution(factor=2, max_level=0.5, level=0.1)


def network(size: Any, *, reference_channels: int = 0, num_classes: int = 3) -> FIT:
    torch.manual_seed(0)
    return FIT(
        input_size=size,
        in_channels=1,
        num_classes=num_classes,
        patch_size=[1, 2, 2],
        group_size=[2 if isinstance(size, list) else 1, 2, 2],
        patch_width=8,
        latent_width=8,
        context_width=8,
        num_latents=8,
        depth=1,
        global_depth=1,
        patch_head_size=4,
        latent_head_size=4,
        reference_channels=reference_channels,
    ).eval()


def pipeline(size: Any, **settings: Any) -> GenerationPipeline:
    return GenerationPipeline(
        model=network(size, **settings),
        autoencoder=Identity(latent_channels=1),
        objective=EDM(sigma_data=1.0, sigma_in=2.0),
        sampler=Euler(3),
        guidance=Unguided(),
        num_classes=3,
    )


def cascade(small: Any, large: Any, level: float | None = None) -> GenerationPipeline:
    enlarging = pipeline(large, reference_channels=1)
    enlarging.config = {"low_resolution": node(LOW)}
    low = enlarging.low_resolution
    assert low == LOW
    enlarging.references = BaseSamples(
        pipeline(small), enlarging.image_shape, low, level, name="small run"
    )
    return enlarging


def node(low: LowResolution) -> dict[str, Any]:
    return {
        "_target_": "genscale.conditioning.low_resolution.LowResolution",
        "factor": low.factor,
        "max_level": low.max_level,
        "level": low.level,
    }


class TestSamplesOfAnotherModel:
    @pytest.mark.parametrize(
        ("small", "large", "shape"),
        [
            (4, 8, (1, 8, 8)),
            ([2, 4, 4], [2, 8, 8], (1, 2, 8, 8)),
            (4, [2, 8, 8], (1, 2, 8, 8)),
        ],
        ids=["pictures", "clips", "clips of a picture"],
    )
    def test_they_are_the_samples_it_makes_itself(
        self, small: Any, large: Any, shape: tuple[int, ...]
    ) -> None:
        enlarging = cascade(small, large)
        seen = []
        forward = enlarging.model.forward

        def watched(x: Any, t: Any, cond: Any, memory: Any = None) -> Any:
            seen.append(cond)
            return forward(x, t, cond, memory)

        enlarging.model.forward = watched  # type: ignore[method-assign]
        images = enlarging.generate(num_samples=5, seed=3, batch_size=5)
        assert images.shape == (5, *shape)
        own = pipeline(small).generate(num_samples=5, seed=3, batch_size=5)
        seeds = rng.sample_seeds(3, 0, 5)
        expected, level = LOW.of_samples(from_uint8(own), seeds)
        # to the rounding of finished samples to 8 bits
        torch.testing.assert_close(seen[0].reference, expected, atol=0.01, rtol=0)
        assert torch.equal(seen[0].reference_level, level)

    def test_a_sample_depends_on_its_seed_and_label_alone(self) -> None:
        enlarging = cascade(4, 8)
        whole = enlarging.generate(num_samples=5, seed=1, batch_size=5).int()
        parts = enlarging.generate(num_samples=5, seed=1, batch_size=2).int()
        assert int((whole - parts).abs().max()) <= 1  # sums of another order

    def test_the_reference_matters_and_so_does_its_level(self) -> None:
        images = {
            level: cascade(4, 8, level).generate(num_samples=2, seed=1) for level in (0.0, 0.1, 0.5)
        }
        assert torch.equal(images[0.1], cascade(4, 8).generate(num_samples=2, seed=1))
        assert not torch.equal(images[0.0], images[0.5])
        alone = cascade(4, 8)
        alone.references = None
        assert not torch.equal(alone.generate(num_samples=2, seed=1), images[0.0])

    def test_what_is_spent_and_said(self) -> None:
        enlarging = cascade(4, 8)
        (batch,) = enlarging.stream(num_samples=3)
        assert batch.nfe.tolist() == [3.0] * 3
        references = enlarging.references
        assert references is not None
        assert references.label == "enlarging samples of small run at level 0.1"
        assert references.record() == {
            "base": "samples of small run",
            "reference_level": 0.1,
            "base_nfe_per_sample": 3.0,
        }

    def test_models_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"base=small run makes samples of shape \[1, 8, 8\]"):
            cascade(8, 8)
        with pytest.raises(ConfigError, match=r"references of shape \[1, 2, 4, 4\] are needed"):
            cascade([4, 4, 4], [2, 8, 8])


def pictures() -> TensorImages:
    draws = rng.normal(rng.key(5, torch.arange(6)), (1, 8, 8))
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    return TensorImages(to_uint8(draws), labels, class_names=("a", "b", "c"), name="noise")


def test_reduced_data_are_of_the_samples_class() -> None:
    data = pictures()
    source = ReducedData(data, LOW)
    ids = torch.tensor([0, 1, 2, 3, 4])
    found = source.pictures(Wanted(ids, ids, labels=torch.tensor([1, 1, 1, 1, 0])))
    # class 1 has rows 1, 4 and 5, class 0 rows 0 and 3
    expected = LOW.reduced(from_uint8(data.images([1, 4, 5, 1, 0])))
    assert torch.equal(found, expected)
    unlabelled = source.pictures(Wanted(ids, ids))
    assert torch.equal(unlabelled, LOW.reduced(from_uint8(data.images([0, 1, 2, 3, 4]))))
    assert source.label == "enlarging reduced noise at level 0.1"


def test_a_prompt_is_needed_where_the_smaller_model_reads_one() -> None:
    base = pipeline(4)
    base.text = object()  # type: ignore[assignment]  # whatever reads text
    source = BaseSamples(base, (1, 8, 8), LOW, name="small run")
    with pytest.raises(ConfigError, match=r"base=small run reads prompts, but the model that enl"):
        source.pictures(Wanted(torch.arange(2), torch.arange(2)))


class TestTraining:
    def module(self, **settings: Any) -> GenerativeModule:
        return GenerativeModule(
            model=network(8, **settings),
            autoencoder=Identity(latent_channels=1),
            objective=EDM(sigma_data=1.0, self_conditioning=0.5),
            optimizer=Lamb(),
            lr_schedule=Constant(),
            ema=ConstantEMA(),
            batch_size=6,
            condition_dropout=1.0,
            seed=11,
            low_resolution=LOW,
        )

    def raw(self) -> dict[str, Any]:
        data = pictures()
        images = data.images(torch.arange(6))
        return {"image": images, "label": data.labels, "position": torch.arange(6) + 30}

    def test_references_are_made_of_the_pictures_themselves(self) -> None:
        module, raw = self.module(reference_channels=1), self.raw()
        batch = module.prepare(raw)
        expected = LOW.of_data(from_uint8(raw["image"]), rng.for_step(11, raw["position"]))
        assert batch.cond.reference is not None
        assert batch.cond.reference_level is not None
        assert torch.equal(batch.cond.reference, expected[0])
        assert torch.equal(batch.cond.reference_level, expected[1])
        # the wish is dropped, what is enlarged is not
        assert batch.cond.labels is not None
        assert bool((batch.cond.labels == -1).all())

    def test_other_models_are_given_none(self) -> None:
        batch = self.module().prepare(self.raw())
        assert batch.cond.reference is None
        assert batch.cond.reference_level is None

    def test_the_reference_is_learned_from(self) -> None:
        module = self.module(reference_channels=1).train()
        loss = module.training_step(self.raw(), 0)
        loss.backward()
        assert bool(torch.isfinite(loss))
        # patches of 2 x 2 pixels of two channels: the picture's own, and the reference's
        gradient = module.model.patch.weight.grad
        assert gradient is not None
        assert bool((gradient.view(8, 2, 4).abs().sum((0, 2)) > 0).all())

    def test_latents_alone_cannot_be_reduced(self) -> None:
        module, raw = self.module(reference_channels=1), self.raw()
        with pytest.raises(DataError, match=r"batches carry cached latents alone"):
            module._reference({"position": raw["position"], "moments": raw["image"]})


def test_an_exported_folder_knows_how_it_was_trained(tmp_path: Path) -> None:
    enlarging = pipeline(8, reference_channels=1)
    parts = ("autoencoder", "objective", "sampler", "guidance", "data_info", "model")
    config: dict[str, Any] = {**{name: {} for name in parts}, "low_resolution": node(LOW)}
    enlarging.save_pretrained(tmp_path, config)
    from genscale.pipeline import exported_config

    assert exported_config(tmp_path)["low_resolution"] == node(LOW)
    pipeline(4).save_pretrained(tmp_path / "small", config)
    assert "low_resolution" not in exported_config(tmp_path / "small")
