"""Which class each sample of a set belongs to: a function of the sample's number alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError
from genscale.rng import Purpose

LabelLaw = Literal["balanced", "random"] | list[int] | tuple[int, ...]


def labels_for(law: LabelLaw, ids: Tensor, *, num_classes: int, seed: int) -> Tensor | None:
    """Return the class of samples ``ids``.

    Args:
        law: ``balanced`` gives sample i class i mod K (any K consecutive samples hold every
            class once); ``random`` draws uniformly, keyed by seed and i; a list is cycled
            through.
        ids: ``(n,)`` int64 sample numbers.
        num_classes: K; 0 means the model is unconditional, and None is returned.
        seed: seed of the sample set.

    Raises:
        ConfigError: an unknown law, or a class outside [0, K).
    """
    if num_classes == 0:
        if isinstance(law, list | tuple):
            raise ConfigError(
                f"labels={list(law)} was given, but the model is unconditional. Leave labels out."
            )
        return None
    if law == "balanced":
        return ids % num_classes
    if law == "random":
        return rng.integers(rng.key(seed, ids, Purpose.LABEL), num_classes)
    if isinstance(law, str) or not law or not all(isinstance(item, int) for item in law):
        raise ConfigError(
            f"labels must be balanced, random or a list of class ids, but {law!r} was given. "
            "Give e.g. labels=balanced or labels=[3,7]."
        )
    wrong = [item for item in law if not 0 <= item < num_classes]
    if wrong:
        raise ConfigError(
            f"labels holds class {wrong[0]}, but the model knows classes 0 to {num_classes - 1}. "
            "Give classes in that range."
        )
    return torch.tensor(law, dtype=torch.int64)[ids % len(law)]
