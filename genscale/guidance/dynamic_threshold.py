"""Dynamic thresholding: guided pixels are kept inside the range that pixels have."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.guidance.base import Guidance
from genscale.guidance.cfg import ClassifierFree, follow
from genscale.objectives.base import Denoiser, Family, Level, Prediction
from genscale.objectives.schedule import NoiseProcess


class DynamicThreshold(Guidance):
    """Brings clean estimates of pixels back to [-1, 1] (arXiv:2205.11487, section 2.3).

    Let q be a high quantile of the absolute clean estimate of a sample. Where q > 1, the estimate
    is cut off at -q and q and divided by q: large weights then saturate no pixels for good. The
    noise estimate follows, so that x = alpha clean + sigma noise still holds. It is for models of
    pixels; latents have no range.

    It goes around another guidance, and acts where that does not, too.

    Args:
        scale: w of classifier-free guidance, where no ``guidance`` is given; None is its default.
        quantile: which quantile, in (0, 1].
        interval: of classifier-free guidance, likewise.
        guidance: whose estimates are brought back; None: classifier-free guidance of the above.

    Raises:
        ConfigError: an impossible number, or settings of two guidances.
    """

    families: ClassVar[frozenset[Family]] = frozenset({"diffusion"})

    def __init__(
        self,
        scale: float | None = None,
        *,
        quantile: float = 0.995,
        interval: Sequence[float] | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        if not 0.0 < quantile <= 1.0:
            raise ConfigError(
                f"guidance.quantile must lie in (0, 1], but is {quantile}. 0.995 is usual."
            )
        if guidance is not None and (scale is not None or interval is not None):
            raise ConfigError(
                "guidance.scale and guidance.interval are those of plain classifier-free guidance, "
                f"but guidance.guidance={type(guidance).__name__} was given too. Give its own "
                "settings, e.g. guidance.guidance.scale=4."
            )
        if guidance is None:
            plain = ClassifierFree(interval=interval)
            guidance = plain if scale is None else ClassifierFree(scale, interval=interval)
        self.quantile = float(quantile)
        self.guidance = guidance

    @property
    def scale(self) -> float | None:
        """That of the guidance inside."""
        return getattr(self.guidance, "scale", None)

    @property
    def interval(self) -> tuple[float, float] | None:
        """That of the guidance inside."""
        return getattr(self.guidance, "interval", None)

    @property
    def label(self) -> str:
        """That of the guidance inside, and the quantile."""
        return f"{self.guidance.label} within the {self.quantile:g} quantile"

    @property
    def active(self) -> bool:
        """It acts without guidance, too."""
        return True

    def check(self, process: NoiseProcess) -> list[str]:
        """Return what the guidance inside has to say."""
        return self.guidance.check(process)

    def along(self, levels: Level | None) -> DynamicThreshold:
        """Return this guidance with the levels at which a sampler's steps begin."""
        return self.around(self.guidance.along(levels))

    def around(self, guidance: Guidance) -> DynamicThreshold:
        """Return the same threshold around another guidance."""
        other = copy.copy(self)
        other.guidance = guidance
        return other

    def wrap(self, view: Denoiser) -> Denoiser:
        """Return the guided view, whose clean estimates are brought back."""
        return ThresholdedView(self.guidance.wrap(view), self.quantile)


class ThresholdedView(Denoiser):
    """A view whose clean estimates are brought back to [-1, 1]; in all else the view it is around.

    Args:
        view: of a network, guided or not.
        quantile: see :class:`DynamicThreshold`.
    """

    def __init__(self, view: Denoiser, quantile: float) -> None:
        self.view = view
        self.quantile = quantile
        self.process = view.process
        self.sample_shape = view.sample_shape
        self.device = view.device

    def __getattr__(self, name: str) -> Any:
        # asked only for what is not set here; "view" itself may not be, in a copy
        if name == "view":
            raise AttributeError(name)
        return getattr(self.view, name)

    def begin(self, batch: int, shape: tuple[int, ...]) -> Any:
        """Return the memory of videos that begin, as the view has it."""
        return self.view.begin(batch, shape)

    def refresh(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Let the view read finished frames."""
        return self.view.refresh(x, level, cond, memory)

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Estimate clean sample and noise of ``x``."""
        prediction = self.view(x, level, cond, memory)
        clean = thresholded(prediction.clean, self.quantile)
        prediction.noise = follow(prediction.noise, clean - prediction.clean, level)
        prediction.clean = clean
        return prediction


def thresholded(clean: Tensor, quantile: float) -> Tensor:
    """Return clamp(clean, -q, q) / q with q the larger of 1 and the quantile of each sample.

    Args:
        clean: ``(B, ...)``.
        quantile: of absolute values, between neighbours linearly.
    """
    flat = clean.abs().flatten(1)
    place = quantile * (flat.shape[1] - 1)
    lower = int(place)
    # the largest ones are few; a sort, or torch's quantile, would take all of a clip
    top = flat.topk(flat.shape[1] - lower, dim=1).values
    below, above = top[:, -1], top[:, max(top.shape[1] - 2, 0)]
    q = torch.lerp(below, above, place - lower).clamp_min(1.0)
    q = q.view(-1, *[1] * (clean.dim() - 1))
    return torch.minimum(torch.maximum(clean, -q), q) / q
