"""LPIPS over any network that gives maps, and structural similarity as a loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from genscale.cli.reconstructing import pair_measures
from genscale.errors import CheckpointError, ConfigError, DataError
from genscale.metrics.features import FeatureNetwork
from genscale.metrics.lpips import LPIPS, map_distances, mean_distance
from genscale.metrics.pixels import Pixels
from genscale.metrics.protocol import EvalProtocol
from genscale.metrics.reconstruction import (
    check_pair,
    fitting_scales,
    multiscale_similarity,
    picture_ssim,
    structural_similarity,
)
from genscale.metrics.suite import EvaluationSuite
from genscale.training.kl import KLReconstruction
from genscale.training.reconstruction import ReconstructionLoss, map_distance, structural_loss


class Two(FeatureNetwork):
    """The colours, and their steps to the right: maps of three and of six channels."""

    name, tap, taps, resize, gives_maps = "two", "mean", {"mean": 3}, "none", True
    sha256 = "0" * 64

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"mean": images.float().mean(dim=(2, 3))}

    def maps(self, images: Tensor) -> list[Tensor]:
        return [images, torch.cat((images.diff(dim=3), images[..., 1:]), dim=1)]


def pair(side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(0, 256, (2, 5, 3, side, side), generator=generator).to(torch.uint8)
    return both[0], both[1]


def heads(path: Path, *channels: int) -> dict[str, Tensor]:
    state = {
        f"lin{number}.model.1.weight": torch.rand(1, size, 1, 1)
        for number, size in enumerate(channels)
    }
    torch.save(state, path)
    return state


def test_the_distance_is_that_of_unit_vectors_weighed_by_channel(tmp_path: Path) -> None:
    images, made = pair()
    state = heads(tmp_path / "heads.pth", 3, 6)
    found = LPIPS(Two(), heads=str(tmp_path / "heads.pth"), batch_size=2)(images, made)
    expected = torch.zeros(5)
    maps = zip(Two().maps(images / 255), Two().maps(made / 255), state.values(), strict=True)
    for a, b, head in maps:
        squared = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
        expected += F.conv2d(squared, head).mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=0)


def test_without_heads_every_channel_counts_1() -> None:
    images, made = pair()
    measure = LPIPS(Two())
    assert torch.equal(measure(images, images), torch.zeros(5, dtype=torch.float64))
    distances = map_distances(Two().maps(images / 255), Two().maps(made / 255))
    assert distances.shape == (5, 2)
    torch.testing.assert_close(measure(images, made), distances.double().sum(1))
    as_loss = map_distance(Two(), images / 127.5 - 1, made / 127.5 - 1)
    torch.testing.assert_close(as_loss, distances.mean(), rtol=1e-4, atol=0)
    assert measure.description == "maps of two, every channel counting 1"
    assert measure.sha256 == "0" * 64


def test_heads_of_another_network_are_refused(tmp_path: Path) -> None:
    images, made = pair()
    file = tmp_path / "heads.pth"
    heads(file, 3, 5)
    with pytest.raises(CheckpointError, match=r"weigh \[3, 5\] channels, .* have \[3, 6\]"):
        LPIPS(Two(), heads=str(file))(images, made)
    torch.save({"other": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="holds no heads of LPIPS"):
        LPIPS(Two(), heads=str(file)).prepare()
    with pytest.raises(ConfigError, match="'pixels' gives none"):
        LPIPS(Pixels())
    with pytest.raises(DataError, match="Give one for each"):
        LPIPS(Two())(images, made[:2])
    with pytest.raises(DataError, match="Metrics read uint8 images"):
        check_pair(images, made.float())
    assert LPIPS(Two(), heads=str(tmp_path / "none")).check() == [
        f"No heads of LPIPS at {tmp_path / 'none'}. Give an existing file, or leave heads out."
    ]


def test_one_scale_is_ssim_and_two_multiply_powers() -> None:
    images, made = pair(24)
    x, y = images.double(), made.double()
    torch.testing.assert_close(
        multiscale_similarity(x, y, num_scales=1), picture_ssim(images, made).clamp(min=0)
    )
    near = (0.8 * x + 0.2 * y).round()
    _, structure = structural_similarity(x, near)
    full, _ = structural_similarity(F.avg_pool2d(x, 2), F.avg_pool2d(near, 2))
    share = 0.0448 / (0.0448 + 0.2856)
    torch.testing.assert_close(
        multiscale_similarity(x, near, num_scales=2), structure**share * full ** (1 - share)
    )
    assert [fitting_scales(side, 999) for side in (8, 21, 22, 44, 175, 176, 500)] == [
        *(1, 1, 2, 3, 4, 5, 5)
    ]


def test_structural_similarity_is_a_loss() -> None:
    """It is 0 for equal pictures, and has gradients also where the structure is reversed."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert float(structural_loss(images, images)) == pytest.approx(0.0, abs=1e-6)
    made = (0.5 * images).requires_grad_()
    loss = structural_loss(made, images)
    loss.backward()
    assert made.grad is not None
    with torch.no_grad():
        assert structural_loss(made - 100 * made.grad, images) < loss
    reversed_ = (-images).requires_grad_()
    structural_loss(reversed_, images).backward()
    assert reversed_.grad is not None
    assert bool(reversed_.grad.isfinite().all())
    with pytest.raises(ConfigError, match=r"objective\.structural_weight must be 0 or more"):
        KLReconstruction(structural_weight=-1.0)


def test_reconstructions_may_be_judged_by_it() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    weight = torch.nn.Parameter(torch.ones(()))
    found = {}
    for share in (0.0, 0.5):
        judge = ReconstructionLoss(KLReconstruction(structural_weight=share), 3)
        found[share] = judge(images, 0.5 * images, 0, weight)
    extra = found[0.5].by_group["model"] - found[0.0].by_group["model"]
    torch.testing.assert_close(extra, 0.5 * structural_loss(0.5 * images, images))
    assert "loss_structural" not in found[0.0].terms
    assert float(found[0.5].terms["loss_structural"]) > 0


def test_the_metrics_of_a_run_that_reconstructs_may_name_distances() -> None:
    """What is not there is said at once; protocols tell the network, and generated samples none."""
    node = {"_target_": "genscale.metrics.lpips.LPIPS", "network": {"_target_": f"{__name__}.Two"}}
    cfg = OmegaConf.create({"metrics": {"pairs": [node]}})
    (measure,) = pair_measures(cfg)
    images, made = pair()
    value = mean_distance(measure, images, made, EvalProtocol(sampler="reconstruction"))
    assert value.name == "lpips_two"
    assert value.value == pytest.approx(float(measure(images, made).mean()))
    assert value.protocol is not None
    assert (value.protocol.features, value.protocol.sampler) == (
        measure.description,
        "reconstruction",
    )
    assert pair_measures(OmegaConf.create({"metrics": {"metrics": None}})) == []
    cfg.metrics.pairs[0].heads = "/nowhere"
    with pytest.raises(ConfigError, match="No heads of LPIPS at /nowhere"):
        pair_measures(cfg)
    suite = EvaluationSuite(["fd_pixels"], [Pixels(1)], pairs=[measure])
    suite.fit_reference(images, None, None, None, "digest")
    suite.update(made)
    with pytest.warns(UserWarning, match="lpips_two, as generated samples have no originals"):
        assert [each.name for each in suite.compute()] == ["fd_pixels"]
