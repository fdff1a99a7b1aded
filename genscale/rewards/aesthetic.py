"""The LAION aesthetic predictor v2: how much people like the look of a picture, from 1 to 10."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.conditioning.transformers_folder import Folder, load_model
from genscale.io.weights import assign_strictly, below, read_checkpoint
from genscale.layers.norm import no_autocast
from genscale.metrics.features import file_sha256
from genscale.rewards.base import Request, RewardOutput
from genscale.rewards.clip import image_embeddings
from genscale.rewards.learned import LearnedReward, Precision, find_file, need_transformers
from genscale.rewards.preprocessing import Preprocessing

_WHAT = (
    "sac+logos+ava1-l14-linearMSE.pth (christophschuhmann/improved-aesthetic-predictor, Apache-2.0)"
)


class LinearHead(nn.Module):
    """Five linear layers and nothing between them; drop-out, which only trains, has no place.

    The numbers of layers are those of published checkpoints, which count the drop-outs.

    Args:
        width: of the input.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, 1024, 128, 64, 16, 1)
        self.layers = nn.ModuleDict(
            {
                name: nn.Linear(widths[i], widths[i + 1])
                for i, name in enumerate(("0", "2", "4", "6", "7"))
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, width)`` to ``(B,)``."""
        for layer in self.layers.values():
            x = layer(x)
        return x.squeeze(-1)


class Aesthetic(LearnedReward):
    """A linear head on the unit embedding of CLIP ViT-L/14; it reads no caption.

    Alone it favours pretty pictures over those that were asked for.

    Args:
        folder: of openai/clip-vit-large-patch14.
        weights: sac+logos+ava1-l14-linearMSE.pth.
        exact: preprocess as the official program does, without gradient.
        precision: of CLIP's arithmetic; the head computes in float32.
    """

    licence = "Apache-2.0 (head), MIT (CLIP)"

    def __init__(
        self,
        *,
        folder: str | None = None,
        weights: str | None = None,
        exact: bool = False,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(precision)
        what = "CLIP ViT-L/14 (openai/clip-vit-large-patch14, MIT)"
        self.folder = Folder("reward.folder", folder, what, ("weights",))
        self.weights = weights
        self.preprocessing = Preprocessing(exact=exact)
        self.differentiable = not exact

    @property
    def settings(self) -> list[str]:
        """The route of preprocessing."""
        return [self.preprocessing.label]

    def digests(self) -> list[str]:
        """Return those of CLIP and the head."""
        return [self.folder.digest(), file_sha256(str(find_file(self.weights, _WHAT)))]

    def find(self) -> None:
        """Look for the folder, the file and the package."""
        self.folder.path()
        find_file(self.weights, _WHAT)
        need_transformers(self)

    def load(self) -> nn.Module:
        """Read both networks."""
        need_transformers(self)
        path = find_file(self.weights, _WHAT)
        # the whole model, which knows its widths; the text tower is given up
        clip: Any = load_model(self.folder, "CLIPModel", "float32")
        head = load_head(path, clip.config.projection_dim)
        parts = {name: clip.get_submodule(name) for name in ("vision_model", "visual_projection")}
        return nn.ModuleDict({**parts, "head": head})

    def prepare(self, requests: Sequence[Request]) -> None:
        """Return nothing: what was asked does not matter."""

    def score(self, images: Tensor, handle: None, index: Tensor) -> RewardOutput:
        """Judge pictures by their looks."""
        network = self.network
        preprocessing = replace(self.preprocessing, size=network.vision_model.config.image_size)
        pixels = preprocessing(images.to(self.device))
        with self.computing():
            embeddings = image_embeddings(network, pixels)
        unit = F.normalize(embeddings.float(), dim=-1)
        with no_autocast(self.device):
            return RewardOutput(network.head(unit))

    def loss(self, images: Tensor, handle: None, index: Tensor) -> Tensor:
        """Return 10 - score.

        Raises:
            NotImplementedError: preprocessing is exact, and has no gradient.
        """
        return 10.0 + super().loss(images, handle, index)


def load_head(path: Path, width: int, prefix: str = "") -> LinearHead:
    """Read a head's checkpoint.

    Args:
        path: the file.
        width: of the embeddings it reads.
        prefix: of its keys.

    Raises:
        CheckpointError: it is missing, damaged, or of other sizes.
    """
    state = read_checkpoint(path)
    with torch.device("meta"):
        head = LinearHead(width)
    assign_strictly(
        head,
        below(state, prefix),
        device=torch.device("cpu"),
        source=path,
        hint=f"Give {_WHAT}.",
    )
    return head
