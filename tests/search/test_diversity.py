"""One candidate of each cluster: features, clusters, and that prompts do not meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError
from genscale.metrics.features import FeatureNetwork
from genscale.metrics.pixels import Pixels
from genscale.rng import Purpose
from genscale.search.diversity import (
    Diversity,
    candidate_clusters,
    candidate_features,
    canonical_sign,
    select_diverse,
)


def draws(count: int, seed: int = 0) -> Tensor:
    return rng.uniform(rng.key(seed, Purpose.DIVERSITY), (16, count))


def planted(sizes: list[int], spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return points ``(n, 5)`` around far centres, and which centre each belongs to."""
    generator = torch.Generator().manual_seed(5)
    label = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    label = label[torch.randperm(len(label), generator=generator)]
    centres = 10 * torch.eye(5)[: len(sizes)]
    return centres[label] + spread * torch.randn(len(label), 5, generator=generator), label


class TestSelection:
    def test_it_is_the_member_nearest_to_the_centroid_of_each_cluster(self) -> None:
        points, label = planted([3, 6, 4, 1])
        chosen = select_diverse(points, 4, draws(4))
        nearest = []
        for cluster in range(4):
            rows = (label == cluster).nonzero()[:, 0]
            centroid = points[rows].mean(0)
            nearest.append(int(rows[(points[rows] - centroid).norm(dim=1).argmin()]))
        assert chosen.tolist() == sorted(nearest)

    def test_distances_to_centroids_need_no_coordinates(self) -> None:
        points, _ = planted([3, 6, 4], spread=4.0)
        labels, squares = candidate_clusters(points, draws(3))
        centroids = torch.stack([points[labels == k].double().mean(0) for k in range(3)])
        torch.testing.assert_close(squares, torch.cdist(centroids, points.double()) ** 2)
        assert torch.equal(labels, squares.argmin(0))  # Lloyd's iteration has settled

    def test_the_lower_one_of_two_that_are_equally_near(self) -> None:
        points = torch.tensor([[0.0], [9.0], [0.37], [9.11], [20.0]])
        assert select_diverse(points, 3, draws(3)).tolist() == [0, 1, 4]
        assert select_diverse(points.flip(0), 3, draws(3)).tolist() == [0, 1, 2]

    def test_equal_candidates_fill_the_places(self) -> None:
        assert select_diverse(torch.ones(5, 3), 3, draws(3)).tolist() == [0, 1, 2]
        two = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
        assert select_diverse(two, 2, draws(2)).tolist() == [0, 3]
        assert len(set(select_diverse(two, 3, draws(3)).tolist())) == 3

    def test_what_differs_by_rounding_is_equal(self) -> None:
        points, _ = planted([3, 6, 4])
        twins = torch.cat((points, points))  # every cluster has its members twice
        expected = select_diverse(twins, 3, draws(3))
        assert torch.equal(expected, select_diverse(points, 3, draws(3)))
        for seed in range(5):
            noise = torch.randn(twins.shape, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(select_diverse(twins * (1 + 1e-7 * noise), 3, draws(3)), expected)
        same = torch.ones(6, 3) * (1 + 1e-7 * torch.randn(6, 3))
        assert select_diverse(same, 4, draws(4)).tolist() == [0, 1, 2, 3]

    def test_all_of_them_and_one_of_them(self) -> None:
        points, _ = planted([4, 4])
        assert select_diverse(points, 8, draws(8)).tolist() == list(range(8))
        one = select_diverse(points, 1, draws(1))
        assert int(one) == int((points - points.mean(0)).norm(dim=1).argmin())

    def test_what_is_not_a_number_is_chosen_at_most_once(self) -> None:
        points, _ = planted([3, 3])
        points[2] = torch.nan
        assert len(set(select_diverse(points, 3, draws(3)).tolist())) == 3


class TestFeatures:
    def test_the_first_principal_direction_of_places_on_a_line(self) -> None:
        along = torch.tensor([0.0, 1.0, 1.0, 6.0])  # its third moment is positive
        direction = torch.tensor([3.0, 0.0, 4.0])
        offset = torch.randn(2, 1, 3)
        tokens = offset + along[None, :, None] * direction
        expected = 5.0 * (along - along.mean())
        got = candidate_features(tokens, "pca")
        torch.testing.assert_close(got, expected.expand(2, -1), atol=1e-5, rtol=0)
        raw = candidate_features(tokens, "pca_raw")
        torch.testing.assert_close(raw.abs(), got.abs())

    def test_a_map_and_its_negative_are_one(self) -> None:
        scores = torch.randn(6, 16)
        turned = canonical_sign(scores)
        assert torch.equal(turned, canonical_sign(-scores))
        assert bool(((turned**3).sum(1) >= 0).all())

    def test_one_direction_of_all_candidates_together(self) -> None:
        tokens = torch.randn(3, 8, 4) + torch.tensor([100.0, 0.0, 0.0, 0.0]) * torch.tensor(
            [0.0, 1.0, 2.0]
        ).view(3, 1, 1)
        got = candidate_features(tokens, "pca_all")
        expected = tokens[..., 0] - tokens[..., 0].mean()
        signed = got * (got * expected).sum().sign()
        torch.testing.assert_close(signed, expected, atol=1.0, rtol=0.02)

    def test_means_and_everything(self) -> None:
        tokens = torch.randn(3, 8, 4)
        torch.testing.assert_close(candidate_features(tokens, "pool"), tokens.mean(1))
        assert torch.equal(candidate_features(tokens, "flat"), tokens.reshape(3, 32))

    def test_pixels_and_latents_need_no_weights(self) -> None:
        pictures = torch.rand(2, 3, 32, 64) * 2 - 1
        pixels = Diversity("pixel")
        assert (pixels.mode, pixels.needs_images, pixels.check()) == ("flat", True, [])
        tokens = pixels.tokens(pictures)
        assert tokens.shape == (2, 256, 3)
        torch.testing.assert_close(tokens[:, 0], pictures[:, :, :2, :4].mean((2, 3)))
        latents = torch.randn(2, 4, 8, 8)
        assert not Diversity("latent").needs_images
        assert torch.equal(Diversity("latent").tokens(latents)[0, 9], latents[0, :, 1, 1])


class Stripes(FeatureNetwork):
    """A network with maps: brightness, and its square, of each pixel."""

    name, tap, taps, resize, gives_maps = "stripes", "mean", {"mean": 1}, "none", True

    @property
    def sha256(self) -> str:
        return "none"

    def check(self) -> list[str]:
        return ["No weights for 'stripes'."]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"mean": images.float().mean((1, 2, 3))[:, None]}

    def maps(self, images: Tensor) -> list[Tensor]:
        return [images, torch.cat((images, images**2), dim=1)]


class TestNetworks:
    def test_the_deepest_map_where_there_are_maps(self) -> None:
        diversity = Diversity(Stripes())
        assert diversity.mode == "pca"
        assert diversity.label == "stripes pca"
        tokens = diversity.tokens(torch.full((2, 1, 4, 4), 0.5))
        assert tokens.shape == (2, 16, 2)
        assert tokens[0, 0].tolist() == [0.75, 0.5625]  # of [0, 1], and squared
        assert diversity.check() == ["No weights for 'stripes'."]

    def test_one_vector_where_there_are_none(self) -> None:
        diversity = Diversity(Pixels(2))
        assert diversity.mode == "pool"
        assert diversity.tokens(torch.zeros(3, 1, 4, 4)).shape == (3, 1, 4)
        with pytest.raises(ConfigError, match="feature_mode=pca needs a map of features, but the"):
            Diversity(Pixels(2), "pca")

    def test_efficientnet_has_maps(self) -> None:
        pytest.importorskip("efficientnet_lite_pytorch")
        from genscale.metrics.efficientnet import EfficientNetLite0

        diversity = Diversity(EfficientNetLite0(input_size=64))
        assert diversity.check() == []
        tokens = diversity.tokens(torch.rand(2, 1, 16, 16) * 2 - 1)
        assert tokens.shape == (2, 4, 320)
        assert candidate_features(tokens, diversity.mode).shape == (2, 4)


class TestPrompts:
    def test_they_do_not_meet(self) -> None:
        points = torch.cat([planted([3, 6, 4], spread)[0] for spread in (0.5, 5.0)])[:, None]
        group, seeds = torch.arange(2).repeat_interleave(13), torch.tensor([7, 8])
        diversity = Diversity("latent")
        both = diversity.choose(points, group, seeds, 2, 4)
        for prompt in range(2):
            rows = slice(13 * prompt, 13 * prompt + 13)
            alone = diversity.choose(
                points[rows], torch.zeros(13).long(), seeds[prompt, None], 2, 4
            )
            assert (alone + 13 * prompt).tolist() == both[4 * prompt : 4 * prompt + 4].tolist()

    def test_the_choice_has_a_key(self) -> None:
        points, group = torch.randn(9, 1, 5), torch.zeros(9).long()
        diversity, seeds = Diversity("latent"), torch.tensor([7])
        first = diversity.choose(points, group, seeds, 2, 3)
        torch.rand(10)  # torch's own generator plays no part
        assert torch.equal(first, diversity.choose(points, group, seeds, 2, 3))


def test_unknown_words_are_told() -> None:
    with pytest.raises(ConfigError, match=r"search.features must be one of .* 'pixels'. Did you"):
        Diversity("pixels")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"search.feature_mode must be one of .* but is 'pc'"):
        Diversity("pixel", "pc")  # type: ignore[arg-type]
