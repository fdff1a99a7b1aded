"""The contract of a feature network: 8-bit pictures or clips in, named feature vectors out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from genscale.errors import DataError

Watch = Callable[[Iterable[Tensor], str, int], Iterable[Tensor]]
"""Passes batches of pictures on and shows how far they are: (batches, what, how many pictures)."""


class FeatureNetwork(nn.Module, ABC):
    """Maps pictures to feature vectors; constructed cheaply, weights are read by :meth:`prepare`.

    Networks of clips are :class:`genscale.metrics.video.clips.ClipNetwork`.

    Attributes:
        name: word in metric names and protocols, for example ``inception`` in ``kid_inception``.
        taps: feature names with their lengths; ``taps[tap]`` is :attr:`num_features`.
        tap: the features that distances and neighbours use.
        resize: what happens to the size of a picture first, as protocols call it.
        learns_from_labels: the network has to be fitted to a labelled training split.
        gives_maps: :meth:`maps` can be asked, for losses.
        per_frame: taps are ``(B, frames, length)``: each frame of a clip, or each patch of a
            picture, is a vector of its set.
        set_of: what is cut up so, as details count it.
        whole_clips: a vector tells of a clip as a whole, as FVD and KVD need it.
    """

    name: str
    taps: dict[str, int]
    tap: str
    resize: str
    learns_from_labels: bool = False
    gives_maps: bool = False
    per_frame: bool = False
    set_of: str = "clips"
    whole_clips: bool = False

    @property
    def num_features(self) -> int:
        """Length of the main feature vector."""
        return self.taps[self.tap]

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hex digest of the weights, or of the recipe where there are none; needs `prepare`."""

    @property
    def description(self) -> str:
        """How protocols name these features: the name with whatever changes the numbers."""
        return self.name

    def check(self) -> list[str]:
        """Return a sentence for everything that is missing; empty when the network can run."""
        return []

    def prepare(self) -> None:
        """Read the weights, once; raises where :meth:`check` would have complained."""

    def check_input(self, images: Tensor) -> Tensor:
        """Return what :meth:`forward` is going to see, after checking that it can.

        Raises:
            DataError: it is nothing this network reads.
        """
        return check_images(images)

    def fit(self, images: Tensor, labels: Tensor | None, fingerprint: str) -> None:
        """Learn from the training split; only networks that ship without weights do so.

        Args:
            images: uint8 ``(n, C, H, W)``.
            labels: ``(n,)`` int64, or None.
            fingerprint: digest of the data, which becomes part of :attr:`sha256`.
        """

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return every tap ``(B, length)`` of uint8 images ``(B, 1 or 3, H, W)``.

        A row depends on its own picture alone (up to rounding of about 1e-6 where convolution
        algorithms change with the batch size).
        """

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return feature maps ``(B, C, h, w)``, shallow first, with gradients to the pictures.

        Args:
            images: float ``(B, 1 or 3, H, W)`` in about [0, 1]; nothing is rounded.

        Raises:
            NotImplementedError: the network has none; see :attr:`gives_maps`.
        """
        raise NotImplementedError(f"The feature network '{self.name}' gives no maps.")


@torch.no_grad()
def extract(
    network: FeatureNetwork,
    images: Tensor,
    taps: tuple[str, ...],
    *,
    batch_size: int = 256,
    watch: Watch | None = None,
) -> dict[str, Tensor]:
    """Run a network over many pictures and collect some taps on the CPU.

    Args:
        network: a prepared network.
        images: uint8 ``(n, 1 or 3, H, W)``, or clips where the network reads them.
        taps: names of the features to keep.
        batch_size: pictures a pass.
        watch: shows progress; None works silently.

    Returns:
        ``(n, length)`` float tensors by tap; ``(n, frames, length)`` of a network of frames.
    """
    parts: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    batches: Iterable[Tensor] = network.check_input(images).split(batch_size)
    if watch is not None:
        batches = watch(batches, f"{network.name} features", len(images))
    for batch in batches:
        output = network(batch.to(device))
        for tap in taps:
            parts[tap].append(output[tap].cpu())
    return {tap: torch.cat(values) for tap, values in parts.items()}


def check_images(images: Tensor) -> Tensor:
    """Return ``images`` after checking that they are 8-bit pictures ``(B, 1 or 3, H, W)``.

    Raises:
        DataError: for another type, number of axes or channels.
    """
    if images.dtype == torch.uint8 and images.dim() == 5:
        raise DataError(
            "A metric of pictures (B, 1 or 3, H, W) was given clips (B, C, T, H, W) of shape "
            f"{tuple(images.shape)}. Take metrics=video, or put the network into "
            "genscale.metrics.video.frames.FrameFeatures."
        )
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            "Metrics read uint8 images of shape (B, 1 or 3, H, W), but got "
            f"{images.dtype} of shape {tuple(images.shape)}. Quantise samples first, e.g. with "
            "genscale.io.images.to_uint8."
        )
    return images


def check_samples(samples: Tensor) -> Tensor:
    """Return ``samples`` after checking that they are 8-bit pictures, or 8-bit clips.

    Raises:
        DataError: for another type, number of axes or channels.
    """
    if samples.dtype == torch.uint8 and samples.dim() == 5 and samples.shape[1] in (1, 3):
        return samples
    return check_images(samples)


def as_rgb(images: Tensor) -> Tensor:
    """Repeat grey pictures ``(B, 1, H, W)`` to three channels; colour ones pass unchanged."""
    return check_images(images).expand(-1, 3, -1, -1)


def fingerprint(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: equal for equal weights in any file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
