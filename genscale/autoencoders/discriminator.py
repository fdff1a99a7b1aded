"""The patch discriminator of VQGAN: one judgement a patch, real or reconstructed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Strided convolutions that end in a map of logits, one a patch (arXiv:1611.07004).

    Group norms stand where the original has batch norms: a picture's logits depend on that picture
    alone, whatever else is in the batch and however it is split over processes.

    Args:
        image_channels: channels of the pictures.
        hidden_size: width of the first layer; each further one doubles it, up to eight times.
        num_layers: layers of stride 2; pictures must have at least ``2 ** num_layers`` pixels a
            side. Each adds a factor of about 2 to the side of a patch.
    """

    def __init__(
        self, *, image_channels: int = 3, hidden_size: int = 64, num_layers: int = 3
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        width = hidden_size
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, stride=2, padding=1)]
        for number in range(1, num_layers):
            before, width = width, hidden_size * min(2**number, 8)
            layers += [
                nn.LeakyReLU(0.2),
                nn.Conv2d(before, width, 4, stride=2, padding=1, bias=False),
                nn.GroupNorm(_groups(width), width),
            ]
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, 1, h, w)`` of pictures ``(B, C, H, W)``: positive says real."""
        logits: Tensor = self.layers(images)
        return logits


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return the hinge loss of a discriminator: mean of max(0, 1 - real) and max(0, 1 + fake)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def generator_hinge(fake: Tensor) -> Tensor:
    """Return what the generator lowers against a hinge discriminator: minus the mean logit."""
    return -fake.mean()


def _groups(width: int) -> int:
    """Return the largest of 32, 16, ... groups that divides a width."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if width % groups == 0)
