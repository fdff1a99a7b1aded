"""Is a picture what its label says? Judged by a classifier trained on the run's data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError, DataError, did_you_mean
from genscale.io.images import to_uint8
from genscale.metrics.keyed_training import Weights, keyed_weights, train_classifier
from genscale.metrics.probe import Probe
from genscale.metrics.subsets import stratified_rows
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.rng import Purpose, key, normal

if TYPE_CHECKING:
    from genscale.data.module import ImageDataModule

Kind = Literal["linear", "convolutional", "features"]
Measure = Literal["log_probability", "agreement"]
_CHANNELS = (16, 32)  # of the two convolutions


@dataclass(frozen=True, slots=True)
class TrainedClassifier:
    """A classifier of pictures.

    Attributes:
        kind: linear on pixels, convolutional, or linear on a probe's features.
        classes: ``(K,)`` int64 labels it tells apart, ascending.
        channels: of the pictures.
        side: height and width at which it looks.
        shift: subtracted from its inputs.
        scale: what they are divided by.
        weights: float32.
        probe: of ``features``, else None.
    """

    kind: Kind
    classes: Tensor
    channels: int
    side: int
    shift: Tensor
    scale: Tensor
    weights: Weights
    probe: Probe | None

    def logits(self, images: Tensor) -> Tensor:
        """Return ``(B, K)`` of pictures ``(B, C, H, W)`` in [0, 1], with gradients if it has any.

        Raises:
            DataError: pictures with another number of channels than those trained on.
        """
        if images.shape[1] != self.channels:
            raise DataError(
                f"The classifier was trained on pictures of {self.channels} channels, but got "
                f"{images.shape[1]}. Give pictures like those of the data."
            )
        weights = {name: value.to(images.device) for name, value in self.weights.items()}
        x = self.inputs(images).to(images.device, torch.float32)
        return _forward(self.kind, weights, x)

    def inputs(self, images: Tensor) -> Tensor:
        """Return what the weights see: pixels averaged over boxes, or features; standardised."""
        if self.probe is None:
            seen = F.adaptive_avg_pool2d(images, self.side)
        else:
            seen = self.probe(to_uint8(2.0 * images.detach() - 1.0))["hidden"]
        return (seen - self.shift.to(seen)) / self.scale.to(seen)


_TRAINED: dict[str, TrainedClassifier] = {}  # by the data and the settings


class ClassifierReward(Reward):
    """The log-probability of the label asked for, by a classifier of the run's training data.

    Nothing is downloaded: the classifier is trained when the reward is fitted, by a keyed recipe,
    and kept for the process. Two rewards with other kinds or seeds are different judges of the
    same question: follow one, and watch the other.

    Parts are ``log_probability`` and ``agreement``: 1 where the label is the likeliest.

    Args:
        measure: what the value is; ``agreement`` has no gradient.
        kind: ``linear`` on pixels, a small ``convolutional`` network, or a linear layer on the
            ``features`` of another one (the probe of evaluations), which have no gradient.
        num_steps: training steps.
        batch_size: pictures of one.
        learning_rate: the first, decayed to zero.
        noise: deviation of the noise on training pictures, in [0, 1] units: what is learned from
            clean pictures alone is pleased by changes that nobody sees. None for features.
        max_images: pictures trained on at most, stratified over the classes.
        max_size: larger pictures are averaged over boxes to this side.
        seed: key of weights, order and noise.

    Raises:
        ConfigError: an unknown measure or kind.
    """

    needs = frozenset({"label"})
    learns = True

    def __init__(
        self,
        *,
        measure: Measure = "log_probability",
        kind: Kind = "convolutional",
        num_steps: int = 300,
        batch_size: int = 128,
        learning_rate: float = 3e-3,
        noise: float = 0.1,
        max_images: int = 10_000,
        max_size: int = 32,
        seed: int = 0,
    ) -> None:
        for setting, value, known in (
            ("measure", measure, get_args(Measure)),
            ("kind", kind, get_args(Kind)),
        ):
            if value not in known:
                raise ConfigError(
                    f"reward.{setting}='{value}' is unknown. Choose one of {', '.join(known)}."
                    f"{did_you_mean(value, known)}"
                )
        self.measure = measure
        self.kind: Kind = kind
        self.differentiable = measure == "log_probability" and kind != "features"
        self.settings: dict[str, Any] = {
            "kind": kind,
            "num_steps": num_steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "noise": noise if kind != "features" else 0.0,
            "max_images": max_images,
            "max_size": max_size,
            "seed": seed,
        }
        self._classifier: TrainedClassifier | None = None

    @property
    def label(self) -> str:
        """Measure, kind, seed, and a digest of the other settings."""
        told = json.dumps(self.settings, sort_keys=True).encode()
        digest = hashlib.sha256(told).hexdigest()[:6]
        return f"Classifier({self.measure}, {self.kind}, seed {self.settings['seed']}, {digest})"

    def fit(self, datamodule: ImageDataModule) -> None:
        """Train on the training split, or take what was trained before on the same.

        Raises:
            DataError: pictures without labels, or of one class.
        """
        train = datamodule.train
        if train.labels is None or len(torch.unique(train.labels)) < 2:
            raise DataError(
                f"reward {self.label} learns from labelled pictures of two classes or more, but "
                f"'{train.name}' has fewer. Choose another reward=..."
            )
        recipe = json.dumps({"data": train.fingerprint(), **self.settings}, sort_keys=True)
        if recipe not in _TRAINED:
            rows = stratified_rows(train.labels, self.settings["max_images"], self.settings["seed"])
            # a search may run inside inference mode, in which nothing can be trained
            with torch.inference_mode(False), torch.enable_grad():
                _TRAINED[recipe] = self._train(train.images(rows), train.labels[rows], recipe)
        self._classifier = _TRAINED[recipe]

    def _train(self, images: Tensor, labels: Tensor, recipe: str) -> TrainedClassifier:
        classes, targets = torch.unique(labels, return_inverse=True)
        seed = self.settings["seed"]
        probe = None
        if self.kind == "features":
            same = {name: self.settings[name] for name in ("num_steps", "batch_size", "max_size")}
            probe = Probe(seed=seed, **same)
            probe.fit(images, labels, recipe)
        side = min(images.shape[2], self.settings["max_size"])
        raw = TrainedClassifier(
            kind=self.kind,
            classes=classes,
            channels=images.shape[1],
            side=side,
            shift=torch.zeros(()),
            scale=torch.ones(()),
            weights={},
            probe=probe,
        )
        seen = raw.inputs(images.double() / 255.0)
        shift, scale = seen.mean(), seen.std().clamp(min=1e-3)
        # in float32, as the reward computes: the same data and settings give the same weights
        seen, noise = ((seen - shift) / scale).float(), self.settings["noise"] / float(scale)

        def logits(weights: Weights, rows: Tensor, step: int) -> Tensor:
            x = seen[rows]
            if noise > 0:
                drawn = normal(key(seed, step, Purpose.NOISE), tuple(x.shape), dtype=x.dtype)
                x = x + noise * drawn
            return _forward(self.kind, weights, x)

        weights = train_classifier(
            keyed_weights(
                _shapes(self.kind, tuple(seen.shape[1:]), len(classes)), seed, dtype=seen.dtype
            ),
            logits,
            targets,
            num_steps=self.settings["num_steps"],
            batch_size=self.settings["batch_size"],
            learning_rate=self.settings["learning_rate"],
            seed=seed,
        )
        return TrainedClassifier(
            kind=self.kind,
            classes=classes,
            channels=raw.channels,
            side=side,
            shift=shift,
            scale=scale,
            weights=weights,
            probe=probe,
        )

    @property
    def classifier(self) -> TrainedClassifier:
        """The trained classifier.

        Raises:
            ConfigError: the reward has not been fitted.
        """
        if self._classifier is None:
            raise ConfigError(
                f"reward {self.label} has not seen the data it learns from. Call "
                "reward.fit(datamodule) first."
            )
        return self._classifier

    def problems(self, requests: Sequence[Request]) -> list[str]:
        """Return a sentence where a label is missing, or is none of those learned."""
        found = super().problems(requests)
        if found or self._classifier is None:
            return found
        known = set(self._classifier.classes.tolist())
        for request in requests:
            if request.label not in known:
                return [
                    f"reward {self.label} tells labels {min(known)} to {max(known)} apart, but "
                    f"label {request.label} was asked for. Ask for labels of the run's data."
                ]
        return []

    def prepare(self, requests: Sequence[Request]) -> Tensor:
        """Return the place of each request's label among the classes, ``(R,)`` int64."""
        labels = torch.tensor([request.label for request in requests], dtype=torch.int64)
        return torch.searchsorted(self.classifier.classes, labels)

    def score(self, images: Tensor, handle: Tensor, index: Tensor) -> RewardOutput:
        """Judge pictures; see :class:`~genscale.rewards.base.Reward`."""
        logits = self.classifier.logits(images)
        asked = handle[index].to(logits.device)
        parts = {
            "log_probability": logits.log_softmax(1).gather(1, asked[:, None])[:, 0],
            "agreement": (logits.argmax(1) == asked).float(),
        }
        return RewardOutput(parts[self.measure], parts)


def _shapes(kind: Kind, inputs: tuple[int, ...], num_classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights for inputs ``(C, H, W)`` or ``(D,)``."""
    if kind != "convolutional":
        size = 1
        for each in inputs:
            size *= each
        return {"output": (num_classes, size)}
    channels, height, width = inputs
    first, second = _CHANNELS
    places = -(-height // 4) * -(-width // 4)  # two strides of two, rounded up
    return {
        "conv_1": (first, channels, 5, 5),
        "conv_2": (second, first, 3, 3),
        "output": (num_classes, second * places),
    }


def _forward(kind: Kind, weights: Weights, x: Tensor) -> Tensor:
    if kind == "convolutional":
        for name, padding in (("conv_1", 2), ("conv_2", 1)):
            bias = weights[f"{name}_bias"]
            x = F.silu(F.conv2d(x, weights[name], bias, stride=2, padding=padding))
    return F.linear(x.flatten(1), weights["output"], weights["output_bias"])
