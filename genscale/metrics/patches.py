"""Picture networks on patches: pictures of any size become sets of patches of one size."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.metrics.features import FeatureNetwork, check_images
from genscale.metrics.parts import PartFeatures


class PatchFeatures(PartFeatures):
    """Features of patches of pictures by a network of pictures: a set of vectors a picture.

    Samples larger than what a model was trained on, or than the data, are compared with the data
    at its own size: ``fd_patch`` is the FD of patches ("pFID" in papers on high resolution). It
    sees detail and texture, and nothing of how a whole picture hangs together; read it beside a
    number of whole pictures.

    Patches lie on a grid that covers a picture evenly, the same for every picture of a size: all
    methods are judged at the same places, whatever order their samples come in. A picture of
    exactly the patch's size is one patch.

    Args:
        network: a network of pictures.
        patch: height and width of a patch in pixels, or one number for both.
        overlap: share of a patch, at least, that neighbours in the grid have in common.
        patches_a_pass: pictures the network sees at once.
        name: word in metric names.

    Raises:
        ConfigError: the network reads clips or patches itself, or a number is out of range.
    """

    per_frame = True
    set_of = "pictures"

    def __init__(
        self,
        network: FeatureNetwork,
        patch: int | tuple[int, int],
        *,
        overlap: float = 0.0,
        patches_a_pass: int = 256,
        name: str = "patch",
    ) -> None:
        if network.whole_clips or network.per_frame:
            raise ConfigError(
                f"PatchFeatures needs a network of pictures, but '{network.name}' reads clips or "
                "patches. Use it as it is."
            )
        sides = (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])
        if min(sides) < 1 or not 0 <= overlap < 1 or patches_a_pass < 1:
            raise ConfigError(
                "PatchFeatures needs patches of 1 pixel or more, an overlap from 0 to below 1 and "
                f"a patch a pass or more, but patch={patch}, overlap={overlap} and "
                f"patches_a_pass={patches_a_pass} were given."
            )
        super().__init__(network, name)
        self.patch = sides
        self.overlap = overlap
        self.patches_a_pass = patches_a_pass

    @property
    def description(self) -> str:
        """The network's name in protocols, with the patches it looks at."""
        apart = f" overlapping by {self.overlap:g}" if self.overlap else ""
        return f"{self.network.description} of {self.patch[0]}x{self.patch[1]} patches{apart}"

    def check_input(self, images: Tensor) -> Tensor:
        """Return pictures after checking that a patch fits in.

        Raises:
            DataError: they are none, or smaller than a patch.
        """
        check_images(images)
        if images.shape[2] < self.patch[0] or images.shape[3] < self.patch[1]:
            raise DataError(
                f"'{self.name}' looks at patches of {self.patch[0]}x{self.patch[1]} pixels, but "
                f"got pictures of {images.shape[2]}x{images.shape[3]}. Give larger pictures, or "
                "patch=<at most their size>."
            )
        return images

    def fit(self, images: Tensor, labels: Tensor | None, fingerprint: str) -> None:
        """Let the network learn from patches of real pictures, each labelled as its picture."""
        patches = self.patches(images)
        repeated = None if labels is None else labels.repeat_interleave(patches.shape[1])
        self.network.fit(patches.flatten(0, 1), repeated, f"{fingerprint} {self.description}")

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return (top, left) of every patch of a picture, row by row."""
        rows, columns = (
            _starts(side, patch, self.overlap)
            for side, patch in zip((height, width), self.patch, strict=True)
        )
        return [(top, left) for top in rows for left in columns]

    def patches(self, images: Tensor) -> Tensor:
        """Return the patches of pictures ``(B, C, H, W)``: ``(B, patches, C, h, w)``."""
        height, width = self.patch
        images = self.check_input(images)
        parts = [
            images[:, :, top : top + height, left : left + width]
            for top, left in self.corners(*images.shape[2:])
        ]
        return torch.stack(parts, dim=1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return every tap ``(B, patches, length)`` of pictures ``(B, 1 or 3, H, W)``."""
        patches = self.patches(images)
        found: dict[str, list[Tensor]] = {}
        for part in patches.flatten(0, 1).split(self.patches_a_pass):
            for tap, value in self.network(part).items():
                found.setdefault(tap, []).append(value)
        self.taps = self.network.taps  # pixels learn their number from pictures
        return {
            tap: torch.cat(values).unflatten(0, patches.shape[:2]) for tap, values in found.items()
        }


def _starts(side: int, patch: int, overlap: float) -> list[int]:
    """Return where patches begin: as few as cover the side with the overlap, evenly spread."""
    room = side - patch
    step = max(1, int(patch * (1.0 - overlap)))
    count = -(-room // step) + 1
    return [number * room // max(1, count - 1) for number in range(count)]
