"""Features without downloaded weights: the hidden layer of a classifier of the training split."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.metrics.features import FeatureNetwork, check_images
from genscale.metrics.keyed_training import Weights, keyed_weights, train_classifier
from genscale.metrics.subsets import stratified_rows

_CHANNELS = (16, 32)


class Probe(FeatureNetwork):
    """A small convolutional classifier, trained on real labelled pictures by a fixed recipe.

    Two strided convolutions, one hidden linear layer, one output layer. The features are the
    hidden layer before its ReLU: roughly Gaussian, of full rank, and sensitive to what tells the
    classes apart. They are shifted and scaled (by one number) so that on the training pictures
    their means are 0 and their variances 1 on average. Weights, batches and steps are keyed and
    everything runs in float64 on the CPU, so the same data and settings give the same features.

    A distance of probe features compares runs on one data set; the digest of data and settings is
    part of the protocol, so numbers of different probes never meet in a table.

    Args:
        num_features: width of the hidden layer.
        num_steps: training steps.
        batch_size: pictures a step.
        learning_rate: peak of AdamW's rate, decayed to zero along a cosine.
        max_images: pictures trained on at most, stratified over the classes.
        max_size: larger pictures are first averaged over boxes to this side.
        seed: key of weights and batches.
        name: word in metric names.
    """

    tap = "hidden"
    learns_from_labels = True

    def __init__(
        self,
        *,
        num_features: int = 64,
        num_steps: int = 400,
        batch_size: int = 128,
        learning_rate: float = 3e-3,
        max_images: int = 10_000,
        max_size: int = 32,
        seed: int = 0,
        name: str = "probe",
    ) -> None:
        super().__init__()
        for setting, value in (("num_features", num_features), ("num_steps", num_steps)):
            if value < 1:
                raise ConfigError(f"{setting}={value} is below 1. Give a positive number.")
        if max_size < 4:
            raise ConfigError(f"max_size={max_size} is below 4, the smallest input of the probe.")
        self.name = name
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.max_images = max_images
        self.max_size = max_size
        self.seed = seed
        self.resize = f"box_at_most_{max_size}"
        self.taps = {"hidden": num_features}
        # no parameters of the module: features are computed on the CPU whatever device is chosen
        self._weights: dict[str, Tensor] = {}
        self._shift, self._scale = 0.0, 1.0
        self._sha256 = ""

    @property
    def description(self) -> str:
        """The name in protocols."""
        return f"probe_{self.num_features}"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that, beside the data, decides the weights."""
        return {
            "num_features": self.num_features,
            "num_steps": self.num_steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "max_images": self.max_images,
            "max_size": self.max_size,
            "seed": self.seed,
        }

    @property
    def sha256(self) -> str:
        """Digest of the data's fingerprint and the settings."""
        self.prepare()
        return self._sha256

    def prepare(self) -> None:
        """Raise a ``ConfigError`` unless the probe has been fitted."""
        if not self._sha256:
            raise ConfigError(
                "The feature network 'probe' has not seen a training split. "
                "Call fit(images, labels, fingerprint) first."
            )

    def fit(self, images: Tensor, labels: Tensor | None, fingerprint: str) -> None:
        """Train the classifier; a second call with the same data does nothing.

        Raises:
            DataError: without labels, or with fewer than two classes.
        """
        recipe = json.dumps({"data": fingerprint, **self.settings}, sort_keys=True)
        digest = hashlib.sha256(recipe.encode()).hexdigest()
        if digest == self._sha256:
            return
        if labels is None or len(labels.unique()) < 2:
            raise DataError(
                "The feature network 'probe' learns from labelled pictures of two classes or more, "
                "but the training split has fewer. Use the features 'pixels' or 'lite0' instead."
            )
        rows = stratified_rows(labels.cpu(), self.max_images, self.seed)
        # an evaluation may run inside inference mode, in which nothing can be trained
        with torch.inference_mode(False), torch.enable_grad():
            pixels = self._shrink(images[rows.to(images.device)]).clone()
            self._shift = float(pixels.mean())
            self._scale = float(pixels.std().clamp(min=1e-3))
            pixels = (pixels - self._shift) / self._scale
            self._train(pixels, labels.cpu()[rows].clone())
            self._normalise(pixels)
        self._sha256 = digest

    def _shrink(self, images: Tensor) -> Tensor:
        pixels = check_images(images).cpu().to(torch.float64) / 255.0
        size = (min(pixels.shape[2], self.max_size), min(pixels.shape[3], self.max_size))
        return F.adaptive_avg_pool2d(pixels, size)

    def _train(self, pixels: Tensor, labels: Tensor) -> None:
        classes, targets = labels.unique(return_inverse=True)
        weights = self._initial_weights(tuple(pixels.shape[1:]), len(classes))

        def logits(weights: Weights, rows: Tensor, _: int) -> Tensor:
            hidden = _hidden(weights, pixels[rows])
            return F.linear(F.relu(hidden), weights["output"], weights["output_bias"])

        self._weights = train_classifier(
            weights,
            logits,
            targets,
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )

    @torch.no_grad()
    def _normalise(self, pixels: Tensor) -> None:
        """Fold shift and scale of the hidden layer into its weights; the output layer is done."""
        hidden = torch.cat([_hidden(self._weights, part) for part in pixels.split(512)])
        scale = hidden.var(dim=0).mean().sqrt()
        self._weights["hidden"] = self._weights["hidden"] / scale
        self._weights["hidden_bias"] = (self._weights["hidden_bias"] - hidden.mean(dim=0)) / scale
        del self._weights["output"], self._weights["output_bias"]

    def _initial_weights(self, shape: tuple[int, ...], num_classes: int) -> dict[str, Tensor]:
        """Return the weights at the start."""
        channels, height, width = shape
        first, second = _CHANNELS
        # each convolution halves a side, rounded up
        flat = second * math.ceil(math.ceil(height / 2) / 2) * math.ceil(math.ceil(width / 2) / 2)
        shapes = {
            "conv_1": (first, channels, 3, 3),
            "conv_2": (second, first, 3, 3),
            "hidden": (self.num_features, flat),
            "output": (num_classes, self.num_features),
        }
        return keyed_weights(shapes, self.seed)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the hidden layer ``(B, num_features)`` float64 on the CPU.

        Raises:
            DataError: if pictures differ in shape from those trained on.
        """
        self.prepare()
        pixels = (self._shrink(images) - self._shift) / self._scale
        expected = self._weights["conv_1"].shape[1]
        if pixels.shape[1] != expected:
            raise DataError(
                f"The probe was trained on pictures of {expected} channels, but got "
                f"{pixels.shape[1]}. Give samples with the channels of the data."
            )
        return {"hidden": _hidden(self._weights, pixels)}


def _hidden(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    for name in ("conv_1", "conv_2"):
        x = F.relu(F.conv2d(x, weights[name], weights[f"{name}_bias"], stride=2, padding=1))
    return F.linear(x.flatten(1), weights["hidden"], weights["hidden_bias"])
