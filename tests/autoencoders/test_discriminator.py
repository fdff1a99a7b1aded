"""The patch discriminator: one logit a patch, of that picture alone."""

from __future__ import annotations

import pytest
import torch

from genscale.autoencoders.discriminator import (
    PatchDiscriminator,
    discriminator_hinge,
    generator_hinge,
)


@pytest.mark.parametrize(("layers", "side"), [(1, 8), (2, 4), (3, 2)])
def test_a_map_of_logits(layers: int, side: int) -> None:
    network = PatchDiscriminator(image_channels=1, hidden_size=4, num_layers=layers)
    assert network(torch.zeros(2, 1, 16, 16)).shape == (2, 1, side, side)


def test_a_picture_is_judged_alone() -> None:
    network = PatchDiscriminator(image_channels=3, hidden_size=6, num_layers=2)
    images = torch.randn(4, 3, 8, 8)
    alone = torch.cat([network(image[None]) for image in images])
    assert torch.allclose(network(images), alone, atol=1e-6)


def test_hinge() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    # max(0, 1 - 2), max(0, 1 - 0.5); max(0, 1 - 3), max(0, 1 + 1)
    assert float(discriminator_hinge(real, fake)) == pytest.approx(0.5 * (0.25 + 1.0))
    assert float(generator_hinge(fake)) == pytest.approx(1.0)
