"""What rewards with a network share: weights read when first needed, a device, a precision."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from genscale.errors import CheckpointError, ConfigError, did_you_mean, require
from genscale.layers.norm import no_autocast
from genscale.rewards.base import Request, Reward

Precision = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LearnedReward(Reward):
    """A frozen network that judges pictures.

    Weights stay float32; layers that allow it compute in the precision (autocast), norms, cosines
    and values in float32, whatever the precision around the reward.

    Args:
        precision: of the network's arithmetic.

    Attributes:
        device: where it computes.

    Raises:
        ConfigError: an unknown precision.
    """

    def __init__(self, precision: Precision = "float32") -> None:
        check_setting("reward.precision", precision, tuple(_DTYPES))
        self.precision = precision
        self.device = torch.device("cpu")
        self._network: nn.Module | None = None
        self._fingerprint: str | None = None

    @property
    def label(self) -> str:
        """The reward, its settings, and which weights it has."""
        words = [*self.settings, self.precision, f"weights {self.fingerprint}"]
        return f"{type(self).__name__}({', '.join(words)})"

    @property
    @abstractmethod
    def settings(self) -> list[str]:
        """What changes the numbers beside precision and weights, in words."""

    @property
    def fingerprint(self) -> str:
        """Eight hex digits over all files that the numbers follow from; ``none`` without them."""
        if self._fingerprint is None:
            try:
                digests = self.digests()
            except (CheckpointError, ConfigError):
                return "none"
            self._fingerprint = hashlib.sha256(" ".join(digests).encode()).hexdigest()[:8]
        return self._fingerprint

    @abstractmethod
    def digests(self) -> list[str]:
        """Return the SHA-256 of every file or folder that the numbers follow from.

        Raises:
            CheckpointError: files are missing.
            ConfigError: no place was given.
        """

    @property
    def network(self) -> Any:
        """The network, frozen, on the device; its weights are read at the first use."""
        if self._network is None:
            self._network = self.load().requires_grad_(False).eval().to(self.device)
        return self._network

    @abstractmethod
    def load(self) -> nn.Module:
        """Read the network's weights.

        Raises:
            CheckpointError: files are missing, damaged, or of another network.
            ConfigError: no place was given.
        """

    def check(self) -> list[str]:
        """Return a sentence for everything that is missing; weights are not read."""
        try:
            self.find()
        except (CheckpointError, ConfigError, ImportError) as error:
            return [str(error)]
        return []

    @abstractmethod
    def find(self) -> None:
        """Look for the files and packages that are needed, without reading weights.

        Raises:
            CheckpointError: files are missing.
            ConfigError: no place was given.
            ImportError: a package is missing.
        """

    def to(self, device: torch.device | str) -> Self:
        """Move the network; handles prepared before stay where they are."""
        self.device = torch.device(device)
        if self._network is not None:
            self._network.to(self.device)
        return self

    def computing(self) -> AbstractContextManager[Any]:
        """Return the context in which the network computes."""
        if self.precision == "float32":
            return no_autocast(self.device)
        return torch.autocast(self.device.type, _DTYPES[self.precision])


def check_setting(key: str, given: str, known: Sequence[str]) -> None:
    """Raise a ``ConfigError`` unless ``given`` is one of ``known``."""
    if given not in known:
        raise ConfigError(
            f"{key} must be one of {', '.join(known)}, but '{given}' was given."
            f"{did_you_mean(given, list(known)) or ' Choose one.'}"
        )


def find_file(weights: str | None, what: str) -> Path:
    """Return the path of a reward's weight file.

    Args:
        weights: path; None where not given.
        what: which file belongs there, where people find it, and its licence.

    Raises:
        ConfigError: none was given.
        CheckpointError: there is no such file.
    """
    if weights is None:
        raise ConfigError(
            f"reward.weights is not set, and {what} is needed. Download it once and give "
            "reward.weights=<its path>."
        )
    path = Path(weights).expanduser()
    if not path.is_file():
        raise CheckpointError(
            f"reward.weights={weights} does not exist, and {what} was expected. Give its path."
        )
    return path


def need_transformers(reward: Reward) -> None:
    """Raise an ``ImportError`` with an install hint unless transformers is there."""
    require("transformers", what=f"reward {type(reward).__name__}", extra="transformers")


def captions_of(requests: Sequence[Request]) -> list[str]:
    """Return the caption of every request.

    Raises:
        ConfigError: one has none.
    """
    captions = [request.caption for request in requests]
    if any(caption is None for caption in captions):
        raise ConfigError(
            "The reward reads captions, but a request has none. Choose another reward=..."
        )
    return [str(caption) for caption in captions]


def once_each(texts: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return the different texts in order, and for every text its place among them."""
    places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(places), torch.tensor([places[text] for text in texts], dtype=torch.int64)
