"""Presets that sample small first: the result, or the way to it, guides larger runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

from torch import nn

from genscale.backbones.base import Backbone
from genscale.errors import ConfigError, did_you_mean
from genscale.resolution.base import ResolutionOp, Sides, linear_factor
from genscale.resolution.entropy import EntropyAttention
from genscale.resolution.flow_guided import FlowAligned, Projection, SkipResidual
from genscale.resolution.presets import Preset, check_share, fitting
from genscale.resolution.rotary import RotaryScaling
from genscale.resolution.sampling import Stage, bicubic, size_step
from genscale.resolution.scale_fusion import ScaleFusion
from genscale.resolution.swin_patches import SwinPatches
from genscale.resolution.text_tiles import TextTiles, joins_words

Enlarge = Literal["latent", "pixel"]


class Cascade(Preset):
    """A preset of several runs.

    Args:
        enlarge: how the result of a run becomes the guide of the next, by bicubic interpolation:
            ``"latent"``, or ``"pixel"``: decoded, enlarged and encoded again, which keeps more
            (arXiv:2503.18446) and needs an autoencoder that encodes.
    """

    cascade = True
    needs: ClassVar[tuple[str, ...]] = ("continuous",)

    def __init__(self, enlarge: Enlarge) -> None:
        if enlarge not in get_args(Enlarge):
            raise ConfigError(
                f"resolution.enlarge must be latent or pixel, but is {enlarge!r}."
                f"{did_you_mean(str(enlarge), get_args(Enlarge))}"
            )
        self.enlarge = enlarge


class SDEdit(Cascade):
    """Enlarge the finished sample, noise it half way and denoise it again (arXiv:2108.01073).

    Args:
        strength: share of the steps that are taken again; 0.2 to 0.5 are usual.
        entropy: keep the entropy of attention where the network has any.
        enlarge: see :class:`Cascade`.
    """

    name = "sdedit"
    uses = ("entropy",)

    def __init__(
        self, *, strength: float = 0.35, entropy: bool = True, enlarge: Enlarge = "latent"
    ) -> None:
        super().__init__(enlarge)
        check_share("strength", strength)
        self.strength, self.entropy = strength, entropy

    def strength_of(self, index: int) -> float:
        """Return the same for every run."""
        return self.strength

    def guided(self, model: nn.Module, stage: Stage) -> list[ResolutionOp]:
        """Return entropy-keeping attention, or nothing: the guide is where the run begins."""
        return fitting(model, [EntropyAttention()] if self.entropy else [])


class FreeScale(Cascade):
    """Fused scales of attention, held to the enlarged result (arXiv:2412.09626).

    Its changes of a UNet's convolutions and skips have no counterpart in transformers.

    Args:
        exponent: of the guide's weight.
        restart: share of the steps that a larger run leaves out.
        sigma: of the blur that divides layout from detail.
        blur_channels: parity: blur across neighbouring channels too.
        enlarge: see :class:`Cascade`.
    """

    name = "freescale"
    needs = ("continuous", "tokens")
    uses = ("tokens",)
    doubling = True

    def __init__(
        self,
        *,
        exponent: float = 2.0,
        restart: float = 0.3,
        sigma: float = 1.0,
        blur_channels: bool = False,
        enlarge: Enlarge = "latent",
    ) -> None:
        super().__init__(enlarge)
        check_share("restart", restart)
        self.exponent, self.restart = exponent, restart
        self.sigma, self.blur_channels = sigma, blur_channels

    def strength_of(self, index: int) -> float:
        """Return the share that is not left out."""
        return 1.0 - self.restart

    def guided(self, model: nn.Module, stage: Stage) -> list[ResolutionOp]:
        """Return the mixed guide and the fused attention."""
        return [
            SkipResidual(stage.guide, stage.noise, exponent=self.exponent),
            ScaleFusion(self.sigma, blur_channels=self.blur_channels),
        ]


class IMax(Cascade):
    """A flow projected onto the enlarged result's (arXiv:2410.07536).

    Args:
        ntk: factor of the rotary base, where there are rotary positions.
        shift: how far the time grid of the larger run is moved towards noise; null: by the side
            over the trained side. (The published runs have shift 3 and then 6.)
        swin_patches: move the grid of patches on every second step.
        text_tiles: repeat words at every tile of the trained size, where a network joins them to
            the picture's tokens as FLUX does.
        enlarge: see :class:`Cascade`.
    """

    name = "imax"
    uses = ("entropy", "rotary")
    doubling = True

    def __init__(
        self,
        *,
        ntk: float = 10.0,
        shift: float | None = None,
        swin_patches: bool = True,
        text_tiles: bool = True,
        enlarge: Enlarge = "latent",
    ) -> None:
        super().__init__(enlarge)
        if shift is not None and shift <= 0.0:
            raise ConfigError(
                f"resolution.shift must be positive, but is {shift}. 1 leaves the times alone."
            )
        self.ntk, self.shift, self.swin_patches = ntk, shift, swin_patches
        self.text_tiles = text_tiles

    def time_shift(self, stage: Stage) -> float:
        """Return the shift of this run."""
        if self.shift is not None:
            return self.shift
        return linear_factor(stage.native, stage.sides)

    def guided(self, model: nn.Module, stage: Stage) -> list[ResolutionOp]:
        """Return the projection, adapted attention and moved patches."""
        return [
            *adapted_attention(model, self.ntk),
            *([TextTiles()] if self.text_tiles and joins_words(model) else []),
            *(moved_patches(model, stage.sides) if self.swin_patches else []),
            Projection(stage.guide, stage.left),
        ]


class HiFlow(Cascade):
    """A flow aligned with the estimates of the smaller run, step by step (arXiv:2504.06232).

    Values are one a larger run, sizes doubling; the last one serves all beyond.

    Args:
        strengths: shares of the steps a larger run takes (16 and 10 of 30 in the paper).
        alphas: weights of the low band at the first step.
        betas: weights of the change of velocity at the first step.
        ratio: of the low-pass filter.
        ntk: factor of the rotary base, where there are rotary positions.
        swin_patches: move the grid of patches on every second step.
        enlarge: see :class:`Cascade`.
    """

    name = "hiflow"
    uses = ("entropy", "rotary")
    records = True
    doubling = True

    def __init__(
        self,
        *,
        strengths: Sequence[float] = (0.533, 0.333),
        alphas: Sequence[float] = (1.0, 0.25),
        betas: Sequence[float] = (0.5, 0.5),
        ratio: float = 0.2,
        ntk: float = 10.0,
        swin_patches: bool = True,
        enlarge: Enlarge = "latent",
    ) -> None:
        super().__init__(enlarge)
        for name, values in (("strengths", strengths), ("alphas", alphas), ("betas", betas)):
            if not values:
                raise ConfigError(
                    f"resolution.{name} must have a value for the first larger run at least, but "
                    "is empty. Give e.g. [0.5]."
                )
            for value in values:
                check_share(name, value)
        self.strengths, self.alphas, self.betas = (
            tuple(float(value) for value in values) for values in (strengths, alphas, betas)
        )
        self.ratio, self.ntk, self.swin_patches = ratio, ntk, swin_patches

    def strength_of(self, index: int) -> float:
        """Return the share of this run; none is longer than the one it follows."""
        return min(_at(self.strengths, k) for k in range(index + 1))

    def guided(self, model: nn.Module, stage: Stage) -> list[ResolutionOp]:
        """Return the alignment, adapted attention and moved patches."""
        references = [
            bicubic(stage.cleans[step], stage.sides) for step in range(stage.first, stage.steps)
        ]
        return [
            *adapted_attention(model, self.ntk),
            *(moved_patches(model, stage.sides) if self.swin_patches else []),
            FlowAligned(
                references,
                alpha=_at(self.alphas, stage.index),
                beta=_at(self.betas, stage.index),
                ratio=self.ratio,
            ),
        ]


def adapted_attention(model: nn.Module, ntk: float) -> list[ResolutionOp]:
    """Return entropy-keeping attention and NTK never slower than interpolation, where they fit."""
    return fitting(model, [EntropyAttention(), RotaryScaling("ntk_clip", ntk=ntk)])


def moved_patches(model: nn.Module, sides: Sides) -> list[ResolutionOp]:
    """Return patches that move, where the network can read a sample one patch larger."""
    patch = size_step(model)
    wider = (sides[0] + patch[0], sides[1] + patch[1])
    if isinstance(model, Backbone) and model.size_problem(*wider) is not None:
        return []
    return [SwinPatches(patch)]


def _at(values: Sequence[float], index: int) -> float:
    return values[min(index, len(values) - 1)]
