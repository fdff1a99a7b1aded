"""Detectors of the transformers library, read from local folders: DETR's family, and OWLv2."""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.conditioning.transformers_folder import Folder, load_model, load_tokenizer
from genscale.errors import CheckpointError, ConfigError, require
from genscale.layers.norm import no_autocast
from genscale.rewards.count_words import class_in, read_counts
from genscale.rewards.detector import Detections, Detector
from genscale.rewards.preprocessing import as_unit_rgb

SOFTMAX_HEADS = ("detr", "yolos", "table-transformer")  # with a class of no object, the last
SIGMOID_HEADS = (
    *("rt_detr", "rt_detr_v2", "conditional_detr", "deformable_detr", "d_fine"),
    *("lw_detr", "rf_detr"),
)
_GREY = 0.5  # what OWLv2 fills pictures up to a square with


@dataclass(frozen=True, slots=True)
class Resizing:
    """What a detector does with pictures, on tensors: differentiable, bilinear with antialiasing.

    Args:
        height: of the result; None keeps the proportions.
        width: of the result.
        shortest: side that the shorter one becomes, where proportions are kept.
        longest: what the longer one may become at most.
        mean: of every channel, subtracted.
        std: of every channel, divided by.
    """

    height: int | None
    width: int | None
    shortest: int
    longest: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, settings: dict[str, Any]) -> Resizing:
        """Take over the settings of a ``preprocessor_config.json``."""
        size = settings.get("size", 800)
        if isinstance(size, int):
            size = {"shortest_edge": size, "longest_edge": settings.get("max_size", 1333)}
        normalised = settings.get("do_normalize", True)
        return cls(
            size.get("height"),
            size.get("width"),
            size.get("shortest_edge", 800),
            size.get("longest_edge", 1333),
            tuple(settings.get("image_mean", (0.485, 0.456, 0.406))) if normalised else (0.0,) * 3,
            tuple(settings.get("image_std", (0.229, 0.224, 0.225))) if normalised else (1.0,) * 3,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare pictures ``(B, 3, H, W)`` in [0, 1]."""
        rows, columns = images.shape[2:]
        if self.height is not None and self.width is not None:
            target = (self.height, self.width)
        else:
            scale = min(self.shortest / min(rows, columns), self.longest / max(rows, columns))
            target = (round(rows * scale), round(columns * scale))
        resized = F.interpolate(
            images, target, mode="bilinear", antialias=True, align_corners=False
        )
        mean, std = (resized.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        return (resized - mean) / std


class FolderDetector(Detector):
    """A detector of the transformers library.

    Args:
        folder: with config.json, preprocessor_config.json and model.safetensors.
        threshold: score above which a candidate counts.
        what: which model belongs there, for error sentences.
        holds: what the folder must hold beside its config.
    """

    def __init__(
        self, folder: str | None, threshold: float, what: str, holds: tuple[Any, ...]
    ) -> None:
        self.folder = Folder("reward.detector.folder", folder, what, holds)
        self.threshold = threshold
        self.device = torch.device("cpu")
        self._network: Any = None

    @property
    def label(self) -> str:
        """The class, and which weights it has."""
        try:
            weights = self.folder.digest()[:8]
        except (CheckpointError, ConfigError):
            weights = "none"
        return f"{type(self).__name__}(weights {weights})"

    def check(self) -> list[str]:
        """Return a sentence for a missing package, folder or file; weights are not read."""
        try:
            require("transformers", what=type(self).__name__, extra="transformers")
            self.settings()
            self.resizing  # noqa: B018
        except (CheckpointError, ConfigError, ImportError) as error:
            return [str(error)]
        return []

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the model's config.

        Raises:
            ConfigError: no folder was given.
            CheckpointError: it is missing, damaged, or of another kind of model.
        """

    @cached_property
    def resizing(self) -> Resizing:
        """What is done with pictures, from ``preprocessor_config.json``.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        file = self.folder.path() / "preprocessor_config.json"
        try:
            return Resizing.read(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} is missing or damaged ({error}), and it says what the detector does with "
                "pictures. Copy the folder again."
            ) from error

    def network(self, class_name: str) -> Any:
        """Return the frozen network; its weights are read at the first use."""
        if self._network is None:
            self._network = load_model(self.folder, class_name, "float32").to(self.device)
        return self._network

    def to(self, device: torch.device | str) -> Self:
        """Move the network."""
        self.device = torch.device(device)
        if self._network is not None:
            self._network.to(self.device)
        return self


class DETRDetector(FolderDetector):
    """A closed-set detector that predicts a set: DETR, RT-DETR, YOLOS and their like.

    Logits are log-odds: of heads with a softmax, a class against all others and no object. The
    class ``object`` is any class: the odds of some object there, or the best of independent
    classes.

    Captions name classes of the detector in the singular or plural, each after a number: "three
    dogs and a cat".

    Args:
        folder: with config.json, preprocessor_config.json and model.safetensors.
        threshold: score above which a candidate counts.
    """

    overlapping = False
    anything = "object"

    def __init__(self, folder: str | None = None, *, threshold: float = 0.3) -> None:
        super().__init__(folder, threshold, "a DETR, RT-DETR or YOLOS model", ("weights",))

    def settings(self) -> dict[str, Any]:
        """Return the model's config; see :meth:`FolderDetector.settings`."""
        config = self.folder.config()
        kind = config.get("model_type")
        if kind not in SOFTMAX_HEADS + SIGMOID_HEADS:
            raise CheckpointError(
                f"reward.detector.folder={self.folder.place} holds a model of type '{kind}', but "
                f"one of {', '.join(SOFTMAX_HEADS + SIGMOID_HEADS)} was expected. Give another "
                "folder."
            )
        return config

    @cached_property
    def kind(self) -> str:
        """The type of the model, as its config calls it."""
        return str(self.settings()["model_type"])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The classes in the order of the logits."""
        labels = self.settings().get("id2label", {})
        return tuple(str(labels[key]) for key in sorted(labels, key=int))

    def read(self, caption: str) -> dict[str, int]:
        """Return the classes that a caption names; see :meth:`Detector.read`."""
        asked: dict[str, int] = {}
        for phrase, count in read_counts(caption).items():
            name = class_in(phrase, self.names)
            if name is None:
                raise ConfigError(
                    f"'{caption}' asks for '{phrase}', which is no class of the detector "
                    f"({', '.join(self.names[:5])}, ...). Name one of its {len(self.names)} "
                    "classes."
                )
            asked[name] = asked.get(name, 0) + count
        return asked

    def number(self, name: str) -> int:
        """Return a class's place among the logits; ``object`` comes after all of them."""
        return len(self.names) if name == self.anything else self.names.index(name)

    def detect(self, images: Tensor, classes: Tensor) -> Detections:
        """Return a candidate a query of the network; see :class:`Detector`."""
        with no_autocast(images.device):
            network = self.network("AutoModelForObjectDetection")
            output = network(pixel_values=self.resizing(as_unit_rgb(images)))
        logits = output.logits.float()
        if self.kind in SOFTMAX_HEADS:
            odds = log_odds(logits)
            some = logits[..., :-1].logsumexp(-1) - logits[..., -1]
        else:
            odds = logits
            some = logits.amax(-1)
        every = torch.cat((odds, some[..., None]), -1).transpose(1, 2)  # (B, classes + 1, N)
        rows = torch.arange(len(images), device=logits.device)[:, None]
        return _detections(every[rows, classes.to(logits.device)], output.pred_boxes)


class OWLv2Detector(FolderDetector):
    """An open-vocabulary detector (arXiv:2306.09683): it looks for what the caption names.

    Pictures are filled up to a square with grey at the right and bottom, as OWLv2 was trained. It
    predicts a box for every patch, so that several may stand for one object.

    Args:
        folder: with config.json, preprocessor_config.json, model.safetensors and the tokenizer.
        threshold: score above which a candidate counts.
        template: of the text that it looks for; ``{}`` is the noun phrase of the caption.
    """

    def __init__(
        self,
        folder: str | None = None,
        *,
        threshold: float = 0.3,
        template: str = "a photo of {}",
    ) -> None:
        super().__init__(folder, threshold, "an OWLv2 model", ("weights", "tokenizer"))
        if "{}" not in template:
            raise ConfigError(
                f"reward.detector.template='{template}' has no {{}} for what is looked for. Give "
                "'a photo of {}', say."
            )
        self.template = template
        self._phrases: list[str] = []  # that captions named so far
        self._words: Any = None

    @property
    def label(self) -> str:
        """The class, its weights, and the template."""
        return f"{super().label[:-1]}, '{self.template}')"

    def settings(self) -> dict[str, Any]:
        """Return the model's config; see :meth:`FolderDetector.settings`."""
        config = self.folder.config()
        if config.get("model_type") != "owlv2":
            raise CheckpointError(
                f"reward.detector.folder={self.folder.place} holds a model of type "
                f"'{config.get('model_type')}', but owlv2 was expected. Give another folder."
            )
        return config

    def read(self, caption: str) -> dict[str, int]:
        """Return the noun phrases of a caption; see :meth:`Detector.read`."""
        return read_counts(caption)

    def number(self, name: str) -> int:
        """Return a noun phrase's number; it is remembered."""
        if name not in self._phrases:
            self._phrases.append(name)
        return self._phrases.index(name)

    def detect(self, images: Tensor, classes: Tensor) -> Detections:
        """Return a candidate a patch of the picture; see :class:`Detector`."""
        self._words = self._words or load_tokenizer(self.folder)
        texts = [self.template.format(self._phrases[i]) for i in classes.flatten().tolist()]
        length = int(self.settings().get("max_position_embeddings", 16))
        words = self._words(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(images.device)
        pixels = as_unit_rgb(images)
        rows, columns = pixels.shape[2:]
        side = max(rows, columns)
        square = F.pad(pixels, (0, side - columns, 0, side - rows), value=_GREY)
        with no_autocast(images.device):
            output = self.network("Owlv2ForObjectDetection")(
                input_ids=words["input_ids"],
                attention_mask=words["attention_mask"],
                pixel_values=self.resizing(square),
            )
        boxes = output.pred_boxes.detach()
        scale = boxes.new_tensor([side / columns, side / rows] * 2)  # back from the square
        return _detections(output.logits.float().transpose(1, 2), boxes * scale)


def log_odds(logits: Tensor) -> Tensor:
    """Return the log-odds ``(..., K)`` of a softmax over K classes and no object, the last."""
    count = logits.shape[-1]
    others = torch.eye(count, dtype=torch.bool, device=logits.device)[:-1]
    rest = logits[..., None, :].masked_fill(others, -torch.inf).logsumexp(-1)
    return logits[..., :-1] - rest


def _detections(logits: Tensor, boxes: Tensor) -> Detections:
    """Join logits ``(B, K, N)`` with boxes ``(B, N, 4)`` given by centre, width and height."""
    centre, side = boxes[..., :2].detach().float(), boxes[..., 2:].detach().float()
    corners = torch.cat((centre - side / 2, centre + side / 2), -1)
    return Detections(logits, corners[:, None].expand(-1, logits.shape[1], -1, -1))
