"""The residual multi-scale quantiser: which phi a scale takes, what is matched, what is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.autoencoders.quantizer import Phi, QuantizeOutput, ScaleQuantizer, phi_of_scale
from genscale.errors import ConfigError
from genscale.rng import key, normal

OBLONG = [1, [1, 2], [2, 3], [4, 6]]


def quantizer(**changes: Any) -> ScaleQuantizer:
    """A quantiser with codes far enough apart to matter."""
    settings: dict[str, Any] = {"vocab_size": 32, "latent_channels": 4, "scales": [1, 2, 4]}
    torch.manual_seed(0)
    made = ScaleQuantizer(**{**settings, **changes})
    with torch.no_grad():
        made.embedding.weight.normal_()
    return made


def latents(height: int = 4, width: int = 4, batch: int = 3) -> Tensor:
    return normal(key(0, torch.arange(batch)), (4, height, width))


class TestPhiOfScale:
    # the places of scales 2 and 7 of 10, and of scale 2 of 5, lie midway between two of four
    # ticks; float64 decides. Maps of the official program, that of 5 scales by the same formula.
    @pytest.mark.parametrize(
        ("num_scales", "expected"),
        [
            (5, "01223"),
            (6, "001233"),
            (10, "0011122333"),
            (13, "0001112222333"),
            (14, "00011112222333"),
        ],
    )
    def test_four_layers(self, num_scales: int, expected: str) -> None:
        assert "".join(map(str, phi_of_scale(num_scales, 4))) == expected

    def test_other_numbers_of_layers(self) -> None:
        assert phi_of_scale(10, 1) == (0,) * 10
        assert phi_of_scale(10, 10) == tuple(range(10))  # one a scale
        assert phi_of_scale(4, 4) == (0, 1, 2, 3)
        assert phi_of_scale(5, 2) == (0, 0, 0, 1, 1)  # ticks 1/4 and 3/4: a tie at 1/2
        assert phi_of_scale(1, 4) == (0,)

    @pytest.mark.parametrize(("num_phis", "count"), [(None, 3), (1, 1), (4, 4), (2, 2)])
    def test_layers_are_built_as_they_are_shared(self, num_phis: int | None, count: int) -> None:
        assert len(quantizer(num_phis=num_phis).phis) == count
        assert len(quantizer(num_phis=num_phis, phi_weight=0.0).phis) == 0


class TestContribution:
    def test_phi_keeps_a_share_of_what_comes_in(self) -> None:
        phi, x = Phi(4, 0.25), latents()
        expected = 0.75 * x + 0.25 * F.conv2d(x, phi.weight, phi.bias, padding=1)
        torch.testing.assert_close(phi(x), expected)

    def test_codes_are_upsampled_and_smoothed_by_the_layer_of_their_scale(self) -> None:
        made = quantizer(num_phis=None)
        codes = latents(2, 2).flatten(2).transpose(1, 2)  # row-major
        maps = F.interpolate(latents(2, 2), (4, 4), mode="bicubic", align_corners=False)
        assert torch.equal(made.contribution(codes, 1), made.phis[1](maps))

    def test_the_last_scale_is_smoothed_without_a_resize(self) -> None:
        made = quantizer()
        codes = latents().flatten(2).transpose(1, 2)
        assert torch.equal(made.contribution(codes, 2), made.phis[3](latents()))
        assert torch.equal(quantizer(phi_weight=0.0).contribution(codes, 2), latents())


class TestNearest:
    def test_distance_is_least(self) -> None:
        made = quantizer()
        rows = latents(5, 7).flatten(2).transpose(1, 2).flatten(0, 1)
        expected = torch.cdist(rows.double(), made.embedding.weight.double()).argmin(1)
        assert torch.equal(made.nearest(rows), expected)

    def test_the_angle_is_what_counts_with_cosine(self) -> None:
        made = quantizer(cosine=True)
        rows = latents(5, 7).flatten(2).transpose(1, 2).flatten(0, 1)
        unit = [F.normalize(x.double(), dim=1) for x in (rows, made.embedding.weight)]
        assert torch.equal(made.nearest(rows), (unit[0] @ unit[1].T).argmax(1))
        assert torch.equal(made.nearest(rows), made.nearest(7 * rows))
        assert not torch.equal(made.nearest(rows), quantizer().nearest(rows))

    def test_the_first_of_equal_codes_is_taken(self) -> None:
        made = quantizer()
        with torch.no_grad():
            made.embedding.weight[9] = made.embedding.weight[4]
        assert made.nearest(made.embedding.weight[9:10]).tolist() == [4]

    def test_many_rows_are_matched_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made, rows = quantizer(), latents(4, 8).flatten(2).transpose(1, 2).flatten(0, 1)
        whole = made.nearest(rows)
        monkeypatch.setattr("genscale.autoencoders.quantizer._ENTRIES", 5 * 32)
        assert torch.equal(made.nearest(rows), whole)


@pytest.mark.parametrize("scales", [[1, 2, 4], [4], OBLONG])
@pytest.mark.parametrize("changes", [{}, {"num_phis": None}, {"num_phis": 1, "cosine": True}])
class TestIdentities:
    def prepare(
        self, scales: list[Any], changes: dict[str, Any]
    ) -> tuple[ScaleQuantizer, Tensor, Tensor]:
        made = quantizer(scales=scales, **changes)
        latent = latents(*made.scales[-1])
        return made, latent, made.encode(latent)

    def test_every_scale_codes_what_the_ones_before_have_left(
        self, scales: list[Any], changes: dict[str, Any]
    ) -> None:
        made, latent, tokens = self.prepare(scales, changes)
        snapshots = [torch.zeros_like(latent), *made.snapshots(tokens)]
        for scale, part in enumerate(made.split(tokens)):
            rest = F.interpolate(latent - snapshots[scale], made.scales[scale], mode="area")
            rows = rest.permute(0, 2, 3, 1).flatten(0, 2)
            assert torch.equal(made.nearest(rows).view(len(latent), -1), part)

    def test_training_and_encoding_agree(self, scales: list[Any], changes: dict[str, Any]) -> None:
        made, latent, tokens = self.prepare(scales, changes)
        output = made(latent)
        assert isinstance(output, QuantizeOutput)
        assert torch.equal(output.tokens, tokens)
        torch.testing.assert_close(output.latent, made.snapshots(tokens)[-1])

    def test_features_are_what_adding_scale_by_scale_gives(
        self, scales: list[Any], changes: dict[str, Any]
    ) -> None:
        made, latent, tokens = self.prepare(scales, changes)
        running = torch.zeros_like(latent)
        features: Tensor | None = torch.zeros(len(latent), made.split(tokens)[0].shape[1], 4)
        parts = made.split(made.features(tokens))
        for scale, part in enumerate(made.split(tokens)):
            assert features is not None
            assert torch.equal(parts[scale], features)
            before = running.clone()
            added, features = made.add_scale(running, made.codes(part), scale)
            assert torch.equal(running, before)  # other branches may still need it
            running = added
            assert torch.equal(running, made.snapshots(tokens)[scale])
        assert features is None

    def test_a_picture_is_coded_alike_in_any_batch(
        self, scales: list[Any], changes: dict[str, Any]
    ) -> None:
        made, latent, tokens = self.prepare(scales, changes)
        assert torch.equal(made.encode(latent[1:2]), tokens[1:2])


class TestLearning:
    def test_losses_are_those_of_the_running_latent(self) -> None:
        made, latent = quantizer(beta=0.3), latents()
        output = made(latent)
        expected = [1.3 * F.mse_loss(x, latent) for x in made.snapshots(output.tokens)]
        torch.testing.assert_close(output.losses, torch.stack(expected))

    def test_gradients_pass_straight_through_to_the_encoder(self) -> None:
        made, latent = quantizer(), latents().requires_grad_()
        weight = torch.randn(latent.shape)
        (made(latent).latent * weight).sum().backward()
        torch.testing.assert_close(latent.grad, weight)
        assert made.embedding.weight.grad is None

    def test_the_encoder_is_drawn_with_beta_and_the_codes_with_one(self) -> None:
        made, latent = quantizer(beta=0.25), latents().requires_grad_()
        output = made(latent)
        output.losses.sum().backward()
        snapshots = made.snapshots(output.tokens)
        expected = sum(0.25 * 2 / latent.numel() * (latent - x) for x in snapshots)
        torch.testing.assert_close(latent.grad, expected.detach())
        used = torch.zeros(32, dtype=torch.bool)
        used[output.tokens] = True
        moved = made.embedding.weight.grad.abs().sum(1) > 0
        assert torch.equal(moved, used)
        assert all(phi.weight.grad is not None for phi in (made.phis[0], made.phis[3]))

    def test_what_is_left_over_carries_no_gradient(self) -> None:
        """A loss of the first scale alone moves no code that only later scales use."""
        made = quantizer()
        output = made(latents().requires_grad_())
        output.losses[0].backward()
        first = set(output.tokens[:, 0].tolist())
        moved = made.embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()
        assert set(moved) == first

    def test_residuals_are_the_rows_that_were_matched(self) -> None:
        made = quantizer()
        output = made(latents())
        assert [tuple(rows.shape) for rows in output.residuals] == [(3, 4), (12, 4), (48, 4)]
        found = [made.nearest(rows).view(3, -1) for rows in output.residuals]
        assert torch.equal(torch.cat(found, dim=1), output.tokens)
        assert not any(rows.requires_grad for rows in output.residuals)


class TestSettings:
    def test_other_scales_keep_the_weights(self) -> None:
        made = quantizer(num_phis=None)
        made.use_scales(OBLONG)
        assert made.scales == ((1, 1), (1, 2), (2, 3), (4, 6))
        tokens = made.encode(latents(4, 6))
        assert tokens.shape == (3, 1 + 2 + 6 + 24)
        assert len(made.phis) == 3  # four scales share them by the formula of three
        assert made.hits.shape == (3, 32)

    def test_weights_are_a_function_of_the_seed(self) -> None:
        made = quantizer()
        torch.manual_seed(5)
        made.reset_parameters()
        first = {name: value.clone() for name, value in made.state_dict().items()}
        torch.manual_seed(5)
        made.reset_parameters()
        assert all(torch.equal(first[name], value) for name, value in made.state_dict().items())
        assert made.embedding.weight.abs().max() <= 1 / 32  # VQGAN's start

    def test_settings_out_of_range_are_refused(self) -> None:
        for changes in ({"vocab_size": 1}, {"num_phis": 0}, {"phi_weight": 1.5}):
            with pytest.raises(ConfigError, match=r"were given. Change them"):
                quantizer(**changes)
        with pytest.raises(ConfigError, match="Scales must grow"):
            quantizer(scales=[1, 4, 2])

    def test_another_number_of_tokens_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"20 tokens were given, but .* have 21"):
            quantizer().features(torch.zeros(2, 20, dtype=torch.int64))
