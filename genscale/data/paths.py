"""Paths of very many files, and which of them are held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.rng import Purpose, key, uniform

_SPLIT_SEED = 2105_05233  # fixed: a file stays on its side of the split for ever


def held_out(paths: Paths, fraction: float, what: str = "pictures") -> Tensor:
    """Return which files are held out, by a keyed hash of each path: bool ``(n,)``.

    Raises:
        ConfigError: if the fraction is not between 0 and 1.
        DataError: if a side would be empty.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"data.heldout_fraction={fraction} must lie between 0 and 1, e.g. 0.05.")
    hashes = [
        int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big", signed=True)
        for path in paths
    ]
    keys = key(_SPLIT_SEED, torch.tensor(hashes), Purpose.SUBSET)
    heldout = uniform(keys) < fraction
    if bool(heldout.all()) or not bool(heldout.any()):
        side = "train" if bool(heldout.all()) else "held-out"
        raise DataError(
            f"data.heldout_fraction={fraction} of {len(paths)} {what} leaves the {side} side "
            f"empty. Choose another fraction, or add {what}."
        )
    return heldout


class Paths:
    """A million paths in two tensors, which worker processes share instead of copying."""

    def __init__(self, paths: Sequence[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)
        self._bytes = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        begin, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(self._bytes[begin:end].numpy().tobytes())

    def __iter__(self) -> Iterator[str]:
        whole, ends = self._bytes.numpy().tobytes(), self._ends.tolist()
        for begin, end in pairwise(ends):
            yield os.fsdecode(whole[begin:end])
