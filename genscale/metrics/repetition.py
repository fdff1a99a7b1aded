"""Whether a picture shows the same thing twice: how like distant parts of it are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError
from genscale.metrics.features import FeatureNetwork, check_images
from genscale.metrics.patches import PatchFeatures
from genscale.metrics.picture_measures import PictureMeasure
from genscale.metrics.protocol import Setting
from genscale.metrics.single import Combined


class Repetition(PictureMeasure):
    """The likeness of the two most alike parts of a picture that do not touch.

    A model asked for more pixels than it was trained with tends to fill each part of the picture
    as if it were a whole one. Parts are square crops, half of one apart; of every pair at least a
    crop apart in rows or columns the cosine of their features is taken, each vector less its own
    mean. The value is the mean over pictures of the highest cosine of any pair, its detail
    ``mean_pair`` that of all pairs. Real pictures repeat themselves too (skies, walls): the
    number is to be read beside theirs.

    Args:
        network: of pictures; one that needs no real pictures to be scaled by.
        crop: side of a crop in pixels, e.g. the side of pictures trained on.
        crops_a_pass: crops seen at once.
        name: of the metric.

    Raises:
        ConfigError: a number is too small, or the network reads no pictures.
    """

    columns = ("highest", "mean_pair")
    unfit = "no picture has two crops that do not touch"

    def __init__(
        self,
        network: FeatureNetwork,
        *,
        crop: int,
        crops_a_pass: int = 256,
        name: str = "repetition",
    ) -> None:
        if crop < 2:
            raise ConfigError(f"Repetition needs crops of 2 pixels or more, but got crop={crop}.")
        self.network = network
        self.crops = PatchFeatures(network, crop, overlap=0.5, patches_a_pass=crops_a_pass)
        self.crop = crop
        self.name = name
        self.resize = network.resize

    @property
    def description(self) -> str:
        """The network."""
        return f"likeness of distant crops by {self.network.description}"

    @property
    def sha256(self) -> str:
        """Digest of the network."""
        return self.network.sha256

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The crops."""
        return (("crop", self.crop),)

    def check(self) -> list[str]:
        """Return what the network complains of."""
        return self.network.check()

    def prepare(self, device: torch.device) -> None:
        """Read the network's weights."""
        self.network.prepare()
        self.network.to(device)

    def of_pictures(self, images: Tensor) -> Tensor:
        """Return the highest and the mean cosine of distant pairs; see the base class."""
        height, width = check_images(images).shape[2:]
        if min(height, width) < self.crop or max(height, width) < 2 * self.crop:
            return torch.full((len(images), 2), torch.nan, dtype=torch.float64)
        corners = torch.tensor(self.crops.corners(height, width))
        apart = (corners[:, None] - corners[None]).abs().amax(-1) >= self.crop
        features = self.crops(images)[self.network.tap].double()
        features = F.normalize(features - features.mean(-1, keepdim=True), dim=-1)
        pairs = (features @ features.mT)[:, apart]  # every pair twice
        return torch.stack((pairs.amax(1), pairs.mean(1)), dim=1)

    def combine(self, rows: Tensor) -> Combined:
        """Return the mean of the highest cosines, with its spread and the mean of all pairs."""
        value, details = super().combine(rows)
        return value, details | {"mean_pair": float(rows[:, 1].mean())}
