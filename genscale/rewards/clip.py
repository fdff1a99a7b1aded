"""Rewards that are the cosine of a picture's and a caption's CLIP embedding (arXiv:2103.00020)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.conditioning.transformers_folder import Folder, load_model, load_tokenizer
from genscale.metrics.features import file_sha256
from genscale.rewards.base import Request, RewardOutput
from genscale.rewards.learned import (
    LearnedReward,
    Precision,
    captions_of,
    check_setting,
    find_file,
    need_transformers,
    once_each,
)
from genscale.rewards.open_clip import VIT_H_14, OpenCLIPSizes, load_open_clip
from genscale.rewards.preprocessing import Preprocessing


class CLIPReward(LearnedReward):
    """The cosine of both embeddings, and what a reward makes of it.

    Captions longer than the model reads are cut, as the official programs do.

    Args:
        tokenizer: folder of the tokenizer.
        preprocessing: how pictures reach the network; the size is the network's own.
        precision: see :class:`~genscale.rewards.learned.LearnedReward`.
    """

    needs = frozenset({"caption"})

    def __init__(
        self, tokenizer: Folder, preprocessing: Preprocessing, precision: Precision
    ) -> None:
        super().__init__(precision)
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.differentiable = not preprocessing.exact
        self._words: Any = None

    @property
    def settings(self) -> list[str]:
        """The route of preprocessing."""
        return [self.preprocessing.label]

    def prepare(self, requests: Sequence[Request]) -> Tensor:
        """Return the captions' unit embeddings, ``(G, D)`` float32."""
        texts, places = once_each(captions_of(requests))
        if self._words is None:
            self._words = load_tokenizer(self.tokenizer)
        words = self._words(
            texts,
            padding=True,
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        with torch.no_grad(), self.computing():
            out = self.network.text_model(
                input_ids=words["input_ids"], attention_mask=words["attention_mask"]
            )
            embeddings = self.network.text_projection(out.pooler_output)
        return F.normalize(embeddings.float(), dim=-1)[places.to(self.device)]

    def cosines(self, images: Tensor, handle: Tensor, index: Tensor) -> Tensor:
        """Return the cosines ``(B,)`` float32, with gradients unless preprocessing is exact."""
        network = self.network
        preprocessing = replace(self.preprocessing, size=network.config.vision_config.image_size)
        pixels = preprocessing(images.to(self.device))
        with self.computing():
            embeddings = image_embeddings(network, pixels)
        embeddings = F.normalize(embeddings.float(), dim=-1)
        return (embeddings * handle[index.to(handle.device)]).sum(-1)

    def score(self, images: Tensor, handle: Tensor, index: Tensor) -> RewardOutput:
        """Judge pictures; the cosine is told beside the value."""
        cosine = self.cosines(images, handle, index)
        return RewardOutput(self.value_of(cosine), {"cosine": cosine})

    def loss(self, images: Tensor, handle: Tensor, index: Tensor) -> Tensor:
        """Return ``(B,)`` numbers to minimise, as ReNO weighs them (arXiv:2406.04312).

        Raises:
            NotImplementedError: preprocessing is exact, and has no gradient.
        """
        if not self.differentiable:
            return super().loss(images, handle, index)
        return self.loss_of(self.cosines(images, handle, index))

    @abstractmethod
    def value_of(self, cosine: Tensor) -> Tensor:
        """Return the reward of cosines ``(B,)``."""

    @abstractmethod
    def loss_of(self, cosine: Tensor) -> Tensor:
        """Return what is minimised, of cosines ``(B,)``."""


class CLIPFolderReward(CLIPReward):
    """Of a CLIP model in a local folder of the transformers library.

    Args:
        what: which model belongs there, with its licence.
        folder: config.json and model.safetensors.
        tokenizer: folder of the tokenizer; None: the same.
        exact: preprocess as the official program does, without gradient.
        precision: of the network's arithmetic.
    """

    def __init__(
        self,
        what: str,
        folder: str | None,
        tokenizer: str | None,
        exact: bool,
        precision: Precision,
    ) -> None:
        whole = tokenizer is None
        super().__init__(
            Folder("reward.folder", folder, what)
            if whole
            else Folder("reward.tokenizer", tokenizer, "a CLIP model", ("tokenizer",)),
            Preprocessing(exact=exact, rounding="down"),
            precision,
        )
        holds: tuple[Literal["weights", "tokenizer"], ...] = ("weights", "tokenizer")
        self.folder = Folder("reward.folder", folder, what, holds if whole else ("weights",))

    def find(self) -> None:
        """Look for the folders and the package."""
        self.folder.path()
        self.tokenizer.path()
        need_transformers(self)

    def digests(self) -> list[str]:
        """Return those of the model and the tokenizer."""
        own = self.folder.digest()
        return (
            [own] if self.tokenizer.place == self.folder.place else [own, self.tokenizer.digest()]
        )

    def load(self) -> nn.Module:
        """Read the model."""
        need_transformers(self)
        return load_model(self.folder, "CLIPModel", "float32")


class CLIPScore(CLIPFolderReward):
    """How well a picture fits its caption, by a CLIP model as published.

    Args:
        folder: of e.g. openai/clip-vit-large-patch14 or laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        tokenizer: folder of the tokenizer; None: the same.
        scale: ``cos`` as it is; ``torchmetrics``: 100 max(cos, 0); ``hessel``: 2.5 max(cos, 0)
            (arXiv:2104.08718).
        exact: preprocess as the official program does, without gradient.
        precision: of the network's arithmetic.

    Raises:
        ConfigError: an unknown scale or precision.
    """

    licence = "MIT (openai/clip-vit-*, laion/CLIP-*)"

    def __init__(
        self,
        *,
        folder: str | None = None,
        tokenizer: str | None = None,
        scale: Literal["cos", "torchmetrics", "hessel"] = "cos",
        exact: bool = False,
        precision: Precision = "float32",
    ) -> None:
        what = "a CLIP model, e.g. openai/clip-vit-large-patch14 (MIT)"
        super().__init__(what, folder, tokenizer, exact, precision)
        check_setting("reward.scale", scale, ("cos", "torchmetrics", "hessel"))
        self.scale = scale

    @property
    def settings(self) -> list[str]:
        """The scale, and the route of preprocessing."""
        return [self.scale, *super().settings]

    def value_of(self, cosine: Tensor) -> Tensor:
        """Return the cosine on its scale."""
        if self.scale == "cos":
            return cosine
        return (100.0 if self.scale == "torchmetrics" else 2.5) * cosine.clamp(min=0.0)

    def loss_of(self, cosine: Tensor) -> Tensor:
        """Return 100 - 100 cos on every scale: a cosine below 0 keeps its gradient."""
        return 100.0 - 100.0 * cosine


class PickScore(CLIPFolderReward):
    """PickScore v1 (arXiv:2305.01569): a CLIP-H that learned which of two pictures people pick.

    The value is exp(logit_scale) cos, about 20 to 23; the softmax over candidates is the
    probability of each to be picked.

    Args:
        folder: of yuvalkirstain/PickScore_v1.
        tokenizer: folder of laion/CLIP-ViT-H-14-laion2B-s32B-b79K's tokenizer; None: the same.
        exact: preprocess as the official program does, without gradient.
        precision: of the network's arithmetic.
    """

    licence = "MIT (yuvalkirstain/PickScore_v1)"

    def __init__(
        self,
        *,
        folder: str | None = None,
        tokenizer: str | None = None,
        exact: bool = False,
        precision: Precision = "float32",
    ) -> None:
        what = "PickScore v1 (yuvalkirstain/PickScore_v1, MIT)"
        super().__init__(what, folder, tokenizer, exact, precision)

    def value_of(self, cosine: Tensor) -> Tensor:
        """Return exp(logit_scale) cos."""
        scale: Tensor = self.network.logit_scale
        return scale.float().exp() * cosine

    def loss_of(self, cosine: Tensor) -> Tensor:
        """Return 30 - exp(logit_scale) cos."""
        return 30.0 - self.value_of(cosine)


class HPS(CLIPReward):
    """Human preference score v2 (arXiv:2306.09341): a tuned open_clip ViT-H-14; the bare cosine.

    Pictures that are not square are made so with black borders, as the official program does.

    Args:
        weights: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt.
        tokenizer: folder of a CLIP tokenizer, e.g. of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        version: which of the two files it is; a part of the label.
        exact: preprocess as the official program does, without gradient.
        precision: of the network's arithmetic. The official program computes in half precision,
            which moves scores by about 1e-3.

    Raises:
        ConfigError: an unknown version or precision.
    """

    licence = "Apache-2.0 (xswu/HPSv2)"
    sizes: OpenCLIPSizes = VIT_H_14

    def __init__(
        self,
        *,
        weights: str | None = None,
        tokenizer: str | None = None,
        version: Literal["2.0", "2.1"] = "2.1",
        exact: bool = False,
        precision: Precision = "float32",
    ) -> None:
        words = Folder("reward.tokenizer", tokenizer, "a CLIP model (MIT)", ("tokenizer",))
        super().__init__(words, Preprocessing(exact=exact, fit="pad"), precision)
        check_setting("reward.version", version, ("2.0", "2.1"))
        self.version = version
        self.weights = weights

    @property
    def settings(self) -> list[str]:
        """The version, and the route of preprocessing."""
        return [f"v{self.version}", *super().settings]

    def digests(self) -> list[str]:
        """Return those of the checkpoint and the tokenizer."""
        return [file_sha256(str(self._file())), self.tokenizer.digest()]

    def find(self) -> None:
        """Look for the file, the tokenizer and the package."""
        self._file()
        self.tokenizer.path()
        need_transformers(self)

    def load(self) -> nn.Module:
        """Read the checkpoint."""
        need_transformers(self)
        return load_open_clip(self._file(), self.sizes)

    def _file(self) -> Path:
        name = "HPS_v2_compressed.pt" if self.version == "2.0" else "HPS_v2.1_compressed.pt"
        return find_file(self.weights, f"{name} (xswu/HPSv2, Apache-2.0)")

    def value_of(self, cosine: Tensor) -> Tensor:
        """Return the cosine, about 0.2 to 0.35."""
        return cosine

    def loss_of(self, cosine: Tensor) -> Tensor:
        """Return 1 - cos."""
        return 1.0 - cosine


def image_embeddings(network: Any, pixels: Tensor) -> Tensor:
    """Return what a CLIP model of transformers makes of pixels ``(B, 3, H, W)``, not normalised."""
    pooled = network.vision_model(pixel_values=pixels).pooler_output
    embeddings: Tensor = network.visual_projection(pooled)
    return embeddings
