"""How steady a clip is: subject and background consistency, and flickering, as VBench has them.

VBench (arXiv:2311.17982), Apache-2.0, measures frames by pretrained networks; here any network of
pictures can be injected, and its name stands in the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import DataError
from genscale.metrics.features import FeatureNetwork
from genscale.metrics.single import Combined
from genscale.metrics.video.clips import flat_frames
from genscale.metrics.video.measures import ClipMeasure


def frame_consistency(features: Tensor) -> Tensor:
    """Return how like its predecessor and the first frame each later frame is.

    For frame t = 2 .. T: (max(0, cos(f_t, f_{t-1})) + max(0, cos(f_t, f_1))) / 2.

    Args:
        features: ``(..., T, d)`` of frames, of any length (they are normalised here).

    Returns:
        ``(..., T - 1)`` in [0, 1].

    Raises:
        DataError: there are fewer than two frames.
    """
    if features.dim() < 2 or features.shape[-2] < 2:
        raise DataError(
            "Consistency compares frames, so features of shape (..., T, d) with T of at least 2 "
            f"were expected, but got {tuple(features.shape)}. Give longer clips."
        )
    unit = F.normalize(features, dim=-1)
    before = (unit[..., 1:, :] * unit[..., :-1, :]).sum(-1).clamp(min=0.0)
    first = (unit[..., 1:, :] * unit[..., :1, :]).sum(-1).clamp(min=0.0)
    return (before + first) / 2.0


class FrameConsistency(ClipMeasure):
    """Subject or background consistency, by the features of an injected network.

    VBench's subject consistency takes DINO ViT-B/16, its background consistency CLIP ViT-B/32. As
    published, the value is the mean over the later frames of all clips (longer clips count more).
    A still clip scores 1, so the number is to be read beside a measure of motion and beside what
    real clips score.

    Args:
        network: of pictures.
        name: of the metric, e.g. ``subject_consistency``.
        frames_a_pass: frames seen at once.
    """

    columns = ("sum", "count")

    def __init__(
        self,
        network: FeatureNetwork,
        *,
        name: str = "temporal_consistency",
        frames_a_pass: int = 256,
    ) -> None:
        self.network = network
        self.name = name
        self.frames_a_pass = frames_a_pass
        self.resize = network.resize

    @property
    def description(self) -> str:
        """The network."""
        return f"consistency of {self.network.description}"

    @property
    def sha256(self) -> str:
        """Digest of the network."""
        return self.network.sha256

    def check(self) -> list[str]:
        """Return what the network complains of."""
        return self.network.check()

    def prepare(self, device: torch.device) -> None:
        """Read the network's weights."""
        self.network.prepare()
        self.network.to(device)

    def of_clips(self, clips: Tensor, captions: Sequence[str] | None) -> Tensor:
        """Return sum and count over the later frames of each clip."""
        if clips.shape[2] < 2:
            return torch.full((len(clips), 2), torch.nan, dtype=torch.float64)
        parts = [
            self.network(part)[self.network.tap] for part in flat_frames(clips, self.frames_a_pass)
        ]
        features = torch.cat(parts).unflatten(0, (len(clips), clips.shape[2]))
        each = frame_consistency(features.double())
        counts = torch.full_like(each[:, 0], each.shape[1])
        return torch.stack((each.sum(dim=1), counts), dim=1)

    def combine(self, rows: Tensor) -> Combined:
        """Return the mean over frames of all clips."""
        spread = (rows[:, 0] / rows[:, 1]).std() if len(rows) > 1 else torch.zeros(())
        return float(rows[:, 0].sum() / rows[:, 1].sum()), {"std": float(spread)}


class TemporalFlickering(ClipMeasure):
    """(255 - mean |I_t - I_{t+1}|) / 255 over neighbouring frames, pixels and colours.

    VBench takes it of static scenes alone, where any change is flicker. On clips with motion it is
    a measure of calm, to be read beside what real clips score.

    Args:
        name: of the metric.
    """

    def __init__(self, *, name: str = "temporal_flickering") -> None:
        self.name = name

    @property
    def description(self) -> str:
        """What is computed."""
        return "mean absolute frame difference"

    def of_clips(self, clips: Tensor, captions: Sequence[str] | None) -> Tensor:
        """Return the score of each clip."""
        if clips.shape[2] < 2:
            return torch.full((len(clips), 1), torch.nan, dtype=torch.float64)
        values = clips.to(torch.int16)
        change = (values[:, :, 1:] - values[:, :, :-1]).abs().float().mean(dim=(1, 3, 4))
        return 1.0 - change.double().mean(dim=1, keepdim=True) / 255.0
