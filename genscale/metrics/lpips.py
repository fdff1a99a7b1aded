"""How far a picture is from its own original in the maps of a network: the distance of LPIPS."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import CheckpointError, ConfigError
from genscale.io.weights import read_checkpoint
from genscale.metrics.features import FeatureNetwork, check_images, fingerprint
from genscale.metrics.protocol import EvalProtocol, MetricValue
from genscale.metrics.reconstruction import check_pair

Heads = Sequence[Tensor]
"""One weight a channel, ``(C,)``, for every map."""


def map_distances(first: Sequence[Tensor], second: Sequence[Tensor], heads: Heads = ()) -> Tensor:
    """Return the distance of every pair of pictures in every map: ``(B, maps)``.

    Vectors along the channels are brought to unit length at every place; their squared
    differences are weighed by the heads, summed over channels, and averaged over places
    (arXiv:1801.03924, eq. 1).

    Args:
        first: maps ``(B, C, h, w)`` of some pictures.
        second: maps of others, of the same shapes.
        heads: weights of the channels; without any each counts 1.
    """
    distances = []
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        squared = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
        if heads:
            squared = squared * heads[number].to(squared).view(1, -1, 1, 1)
        distances.append(squared.sum(1).mean(dim=(1, 2)))
    return torch.stack(distances, dim=1)


class LPIPS:
    """LPIPS (arXiv:1801.03924) over any feature network that gives maps.

    With the heads published for a network the value is comparable with that of papers; without
    heads every channel counts 1, which orders pictures much the same, on a scale of its own. The
    name in protocols tells which.

    Args:
        network: one with ``gives_maps``.
        heads: a file of weights, ``lin0.model.1.weight`` (1, C, 1, 1) and so on, as the package
            lpips has them; None: every channel counts 1.
        batch_size: pairs a pass.
        name: of the metric; None: ``lpips_<network>``.

    Raises:
        ConfigError: the network gives no maps.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        *,
        heads: str | None = None,
        batch_size: int = 64,
        name: str | None = None,
    ) -> None:
        if not network.gives_maps:
            raise ConfigError(
                f"LPIPS compares maps, but '{network.name}' gives none. Give it e.g. "
                "genscale.metrics.efficientnet.EfficientNetLite0."
            )
        if batch_size < 1:
            raise ConfigError(f"LPIPS needs a pair a pass or more, but batch_size={batch_size}.")
        self.network = network
        self.heads = heads
        self.batch_size = batch_size
        self.name = name or f"lpips_{network.name}"
        self._weights: list[Tensor] = []
        self._device = torch.device("cpu")

    @property
    def description(self) -> str:
        """How protocols name it: the network, and whether channels are weighed."""
        weighed = "every channel counting 1" if self.heads is None else "published heads"
        return f"maps of {self.network.description}, {weighed}"

    @property
    def sha256(self) -> str:
        """Digest of the network, and of the heads where there are any."""
        self.prepare()
        own = self.network.sha256
        if not self._weights:
            return own
        heads = fingerprint({f"{number}": head for number, head in enumerate(self._weights)})
        return hashlib.sha256(f"{own} {heads}".encode()).hexdigest()

    def check(self) -> list[str]:
        """Return what the network lacks, and whether the heads are missing."""
        problems = self.network.check()
        if self.heads is not None and not Path(self.heads).expanduser().is_file():
            problems.append(
                f"No heads of LPIPS at {self.heads}. Give an existing file, or leave heads out."
            )
        return problems

    def prepare(self) -> None:
        """Read the weights of network and heads, once.

        Raises:
            CheckpointError: the file holds no heads.
        """
        self.network.prepare()
        if self.heads is not None and not self._weights:
            self._weights = _read_heads(Path(self.heads).expanduser())

    def to(self, device: torch.device | str) -> LPIPS:
        """Choose where the network runs; returns the measure."""
        self.network.to(device)
        self._device = torch.device(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, made: Tensor) -> Tensor:
        """Return the distance of every picture to its original: float64 ``(n,)``, 0 if equal.

        Args:
            images: uint8 ``(n, 1 or 3, H, W)``.
            made: the same shape.

        Raises:
            CheckpointError: the heads belong to a network of other maps.
            DataError: other types or shapes.
        """
        check_pair(check_images(images), check_images(made))
        self.prepare()
        parts = []
        for original, other in zip(
            images.split(self.batch_size), made.split(self.batch_size), strict=True
        ):
            first, second = (
                self.network.maps(part.to(self._device).float() / 255.0)
                for part in (original, other)
            )
            self._check_heads(first)
            parts.append(map_distances(first, second, self._weights).double().sum(1).cpu())
        return torch.cat(parts)

    def _check_heads(self, maps: Sequence[Tensor]) -> None:
        channels = [each.shape[1] for each in maps]
        if self._weights and [len(head) for head in self._weights] != channels:
            raise CheckpointError(
                f"The heads in {self.heads} weigh {[len(head) for head in self._weights]} "
                f"channels, but the maps of '{self.network.name}' have {channels}. Give the heads "
                "of this network."
            )


def mean_distance(
    measure: LPIPS, images: Tensor, made: Tensor, protocol: EvalProtocol
) -> MetricValue:
    """Return the mean distance of pictures from their originals, under its protocol.

    Args:
        measure: what is measured.
        images: uint8 ``(n, 1 or 3, H, W)``.
        made: the same shape.
        protocol: how they were made.
    """
    distances = measure(images, made)
    under = protocol.replace(
        features=measure.description,
        features_sha256=measure.sha256,
        resize=measure.network.resize,
    )
    details = {"n": len(distances), "std": float(distances.std(correction=0))}
    return MetricValue(measure.name, float(distances.mean()), under.digest, details, under)


def _read_heads(path: Path) -> list[Tensor]:
    state = read_checkpoint(path)
    heads: list[Tensor] = []
    while (head := state.get(f"lin{len(heads)}.model.1.weight")) is not None:
        heads.append(head.detach().float().flatten())
    if not heads:
        raise CheckpointError(
            f"{path} holds no heads of LPIPS (lin0.model.1.weight was expected; first found: "
            f"{next(iter(state), 'nothing')}). Give a file of the package lpips."
        )
    return heads
