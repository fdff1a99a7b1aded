"""Codes that stay alive: where they start, how they move, when they start anew, who uses them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.autoencoders.quantizer import QuantizeOutput, ScaleQuantizer
from genscale.errors import ConfigError
from genscale.training.codebook import USED, CodebookKeeper, CodebookSettings, kmeans
from genscale.training.trainable import PictureBatch

SIZE, VOCAB, CHANNELS = 6, 5, 3
EVEN = SIZE * (1 + 4) / VOCAB  # tokens of a step, spread evenly
YES = torch.tensor(True)


def keeper(**settings: object) -> CodebookKeeper:
    torch.manual_seed(1)
    quantizer = ScaleQuantizer(
        vocab_size=VOCAB, latent_channels=CHANNELS, scales=[1, 2], phi_weight=0.0
    )
    with torch.no_grad():
        quantizer.embedding.weight.normal_()
    return CodebookKeeper(quantizer, CodebookSettings(**settings), seed=3)  # type: ignore[arg-type]


def batch(step: int, rows: slice = slice(None)) -> tuple[Tensor, PictureBatch]:
    """Return latents of some pictures of a step, and the batch they are of."""
    latents = torch.randn(SIZE, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(step))
    position = torch.arange(step * SIZE, (step + 1) * SIZE)
    images = torch.zeros(len(position[rows]), 1, 4, 4)
    return latents[rows], PictureBatch(images, position[rows], step, SIZE)


def observe(kept: CodebookKeeper, step: int, rows: slice = slice(None)) -> QuantizeOutput:
    latents, seen = batch(step, rows)
    quantized: QuantizeOutput = kept.quantizer(latents)
    kept.observe(quantized, seen)
    return quantized


class TestKMeans:
    def test_every_centre_is_the_mean_of_the_rows_nearest_to_it(self) -> None:
        rows = torch.randn(200, 2)
        found = kmeans(rows, 6, iterations=60, key=rng.key(0))
        nearest = torch.cdist(rows, found).argmin(1)
        for code in range(6):
            assert torch.allclose(rows[nearest == code].mean(0), found[code], atol=1e-5)

    def test_two_clouds_have_a_centre_each(self) -> None:
        rows = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 20])
        found = kmeans(rows, 2, iterations=5, key=rng.key(0))
        assert sorted(round(v / 20) for v in found[:, 0].tolist()) == [0, 1]

    def test_a_centre_that_nothing_is_near_to_moves_to_the_farthest_row(self) -> None:
        rows = torch.tensor([[0.0], [0.0], [0.0], [8.0]])
        # all centres start at rows, three of which are one point
        found = kmeans(rows, 3, iterations=3, key=rng.key(5))
        assert {0.0, 8.0} <= set(found.flatten().tolist())

    def test_a_key_decides(self) -> None:
        rows = torch.randn(60, 2)
        first, again = (kmeans(rows, 7, iterations=2, key=rng.key(1)) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, kmeans(rows, 7, iterations=2, key=rng.key(2)))

    def test_fewer_rows_than_centres(self) -> None:
        rows = torch.randn(2, 2)
        found = kmeans(rows, 5, iterations=2, key=rng.key(1))
        assert found.shape == (5, 2)
        assert float(torch.cdist(rows, found).min(1).values.max()) < 1e-6


class TestStart:
    def test_codes_are_centres_of_what_the_scales_see(self) -> None:
        kept = keeper(kmeans_iterations=10)
        latents, seen = batch(0)
        # without phi: scale 0 sees the mean of a latent, scale 1 what that leaves
        mean = latents.mean(dim=(2, 3))
        left = latents - mean[:, :, None, None]
        rows = torch.cat([mean[:, None], left.flatten(2).transpose(1, 2)], dim=1).flatten(0, 1)
        kept.collect(latents, seen.position)
        kept.start()
        expected = kmeans(rows, VOCAB, iterations=10, key=rng.key(3, 1, rng.Purpose.CODEBOOK))
        assert torch.allclose(kept.codes, expected, atol=1e-5)

    def test_the_order_of_batches_does_not_matter(self) -> None:
        whole, split = keeper(), keeper()
        latents, seen = batch(0)
        whole.collect(latents, seen.position)
        for rows in (slice(4, 6), slice(0, 4)):
            split.collect(latents[rows], seen.position[rows])
        whole.start()
        split.start()
        assert torch.equal(whole.codes, split.codes)


class TestEndStep:
    def test_a_code_is_the_moving_average_of_its_rows(self) -> None:
        kept = keeper(decay=0.9, restart_below=0.0)
        kept.updates.fill_(200)  # past the short averages of the beginning
        kept.sizes.fill_(EVEN)
        kept.sums.copy_(EVEN * kept.codes)
        before = kept.codes.clone()
        quantized = observe(kept, 0)
        kept.end_step(YES, SIZE)
        rows = torch.cat([r.view(SIZE, -1, CHANNELS) for r in quantized.residuals], dim=1)
        for code in range(VOCAB):
            mine = rows[quantized.tokens == code]
            size = 0.9 * EVEN + 0.1 * len(mine)
            expected = (0.9 * EVEN * before[code] + 0.1 * mine.sum(0)) / size
            assert torch.allclose(kept.codes[code], expected, atol=1e-6)
            assert float(kept.sizes[code]) == pytest.approx(size)

    def test_averages_are_short_at_first(self) -> None:
        kept = keeper(decay=0.9, restart_below=0.0)
        expected = torch.full((VOCAB,), EVEN)
        for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12)):
            tokens = observe(kept, step).tokens
            kept.end_step(YES, SIZE)
            counts = torch.bincount(tokens.flatten(), minlength=VOCAB)
            expected = decay * expected + (1 - decay) * counts
        assert torch.allclose(kept.sizes, expected)

    def test_by_gradient_codes_are_left_alone(self) -> None:
        kept = keeper(learned_by="gradient", restart_below=0.0)
        before = kept.codes.clone()
        observe(kept, 0)
        kept.end_step(YES, SIZE)
        assert torch.equal(kept.codes, before)
        assert float(kept.sizes.sum()) == pytest.approx(EVEN * VOCAB)

    @pytest.mark.parametrize("learned_by", ["average", "gradient"])
    def test_a_dead_code_becomes_a_row_that_was_seen(self, learned_by: str) -> None:
        kept = keeper(learned_by=learned_by, decay=0.5, restart_below=0.3)
        with torch.no_grad():
            kept.quantizer.embedding.weight[2] = 1e3
        quantized = observe(kept, 0)
        assert 2 not in quantized.tokens
        kept.end_step(YES, SIZE)
        rows = torch.cat(quantized.residuals)  # dead at once: of an even spread, 1 / 10 was kept
        assert float((rows - kept.codes[2]).abs().sum(1).min()) < 1e-6
        assert float(kept.sizes[2]) == pytest.approx(EVEN)

    def test_a_split_step_is_a_step(self) -> None:
        whole, split = keeper(restart_below=0.9), keeper(restart_below=0.9)
        for step in range(3):
            observe(whole, step)
            for rows in (slice(3, 6), slice(0, 1), slice(1, 3)):
                observe(split, step, rows)
            for kept in (whole, split):
                kept.end_step(YES, SIZE)
            assert torch.allclose(whole.codes, split.codes, atol=1e-6)
            assert torch.allclose(whole.sums, split.sums, atol=1e-5)
            assert torch.equal(whole.quantizer.hits, split.quantizer.hits)

    def test_a_step_that_was_skipped_changes_nothing(self) -> None:
        kept = keeper()
        before = {name: value.clone() for name, value in kept.state_dict().items()}
        codes = kept.codes.clone()
        observe(kept, 0)
        kept.end_step(torch.tensor(False), SIZE)
        assert all(torch.equal(before[name], value) for name, value in kept.state_dict().items())
        assert torch.equal(kept.codes, codes)
        assert float(kept.quantizer.hits.sum()) == 0

    def test_without_batches_nothing_happens(self) -> None:
        kept = keeper()
        kept.end_step(YES, SIZE)
        assert int(kept.updates) == 0


class TestUsage:
    def test_the_counter_advances_once_a_step(self) -> None:
        """Not once a scale, and without any process group."""
        kept = keeper(learned_by="gradient", restart_below=0.0)
        hits = []
        for step in range(3):
            quantized = observe(kept, 0)
            tokens = kept.quantizer.split(quantized.tokens)
            now = torch.stack([torch.bincount(t.flatten(), minlength=VOCAB) for t in tokens])
            hits.append(now.float())
            kept.end_step(YES, SIZE)
            assert int(kept.updates) == step + 1
        # the first is taken as it is, then nine tenths are kept
        expected = 0.9 * (0.9 * hits[0] + 0.1 * hits[1]) + 0.1 * hits[2]
        assert torch.allclose(kept.quantizer.hits, expected)

    def test_after_a_hundred_updates_it_is_slower(self) -> None:
        kept = keeper(learned_by="gradient", restart_below=0.0)
        kept.updates.fill_(100)
        kept.quantizer.hits.fill_(50.0)
        observe(kept, 0)
        kept.end_step(YES, SIZE)
        change = (50.0 - kept.quantizer.hits).sum(1)
        # 1 % of the way from 50 each to the tokens of a scale
        assert change.tolist() == pytest.approx(
            [0.01 * (50 * VOCAB - SIZE * n) for n in (1, 4)], rel=1e-4
        )

    def test_a_code_counts_from_eight_hundredths_of_an_even_spread_on(self) -> None:
        kept = keeper()
        threshold = [USED * SIZE * n / VOCAB for n in (1, 4)]
        coarse = [threshold[0] * factor for factor in (0.99, 1.01, 0, 2, 5)]
        kept.quantizer.hits.copy_(torch.tensor([coarse, [threshold[1] * 2] * 5]))
        assert kept.usage(SIZE).tolist() == pytest.approx([3 / 5, 1.0])


@pytest.mark.parametrize(
    "settings",
    [{"learned_by": "luck"}, {"decay": 1.0}, {"kmeans_iterations": -1}, {"restart_below": math.pi}],
)
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"objective\.codebook"):
        CodebookSettings(**settings)  # type: ignore[arg-type]
