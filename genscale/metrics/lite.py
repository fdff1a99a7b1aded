"""What features without weights share: keyed random filters, and scales taken from a reference."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import ConfigError
from genscale.rng import Purpose, key, normal

_SMALLEST = 1e-4  # a number that varies less than this over the reference is left as it is


class ReferenceScale(nn.Module):
    """Shifts and scales numbers to mean 0 and variance 1 over a reference, and tames outliers.

    A number z far outside of what real samples show is told as asinh z, about its logarithm, lest
    one that hardly varies in real samples outweigh all others.

    Args:
        length: of a feature vector.
        name: of the network, for sentences.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, length: int, name: str) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(length), persistent=False)
        self.register_buffer("scale", torch.ones(length), persistent=False)
        self.name = name
        self._digest = ""

    @property
    def digest(self) -> str:
        """Digest of the reference and the network's settings.

        Raises:
            ConfigError: no reference has been seen.
        """
        self.check()
        return self._digest

    def check(self) -> None:
        """Raise a ``ConfigError`` unless a reference has been seen."""
        if not self._digest:
            raise ConfigError(
                f"The feature network '{self.name}' has not seen real samples, which its numbers "
                "are scaled by. Call fit(samples, None, fingerprint) first, or give a reference "
                "of samples."
            )

    def is_fitted(self, fingerprint: str, settings: dict[str, Any]) -> bool:
        """Return whether this reference was the last one seen."""
        return self._digest == _digest(fingerprint, settings)

    def fit(self, values: Tensor, fingerprint: str, settings: dict[str, Any]) -> None:
        """Take shift and scale from a reference.

        Args:
            values: ``(n, length)``, its numbers as they are.
            fingerprint: digest of the data.
            settings: everything else that decides the numbers.
        """
        values = values.double()
        deviation = values.std(dim=0, correction=0)
        self.mean.copy_(values.mean(dim=0))
        self.scale.copy_(torch.where(deviation > _SMALLEST, deviation, 1.0))
        self._digest = _digest(fingerprint, settings)

    def forward(self, values: Tensor) -> Tensor:
        """Return numbers ``(B, length)`` on the reference's scale."""
        self.check()
        return torch.asinh((values - self.mean) / self.scale)


def _digest(fingerprint: str, settings: dict[str, Any]) -> str:
    recipe = json.dumps({"data": fingerprint, **settings}, sort_keys=True)
    return hashlib.sha256(recipe.encode()).hexdigest()


def random_filters(shape: tuple[int, ...], number: int, seed: int) -> Tensor:
    """Draw float64 filters, outputs first, for ReLUs: variance 2 / fan-in (arXiv:1502.01852)."""
    drawn = normal(key(seed, number, Purpose.NETWORK), shape, dtype=torch.float64)
    return drawn * math.sqrt(2.0 / math.prod(shape[1:]))


def mean_and_deviation(maps: Tensor) -> list[Tensor]:
    """Return both of every map ``(B, C, ...)`` over its places, ``(B, C)`` each."""
    flat = maps.flatten(2)
    return [flat.mean(dim=2), flat.std(dim=2, correction=0)]


def check_least(name: str, given: dict[str, int], least: dict[str, int]) -> None:
    """Raise a ``ConfigError`` for a setting below what it must be at least."""
    for setting, smallest in least.items():
        if given[setting] < smallest:
            raise ConfigError(
                f"'{name}' needs {setting} of at least {smallest}, but {setting}="
                f"{given[setting]} was given. Give a larger number."
            )
