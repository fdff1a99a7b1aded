"""Presets that sample small first: the result, or the way to it, guides larger runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.resolution.applicability import traits
from genscale.resolution.attention_probe import WordMaps
from genscale.resolution.base import ResolutionOp, Sides, linear_factor
from genscale.resolution.entropy import EntropyAttention
from genscale.resolution.flow_guided import FlowAligned, Projection, SkipResidual
from genscale.resolution.frequency import match_statistics
from genscale.resolution.local_global import LocalGlobal
from genscale.resolution.patch_prompts import PatchPrompts, ScreenedPrompts
from genscale.resolution.presets import Preset, check_count, check_share, fitting
from genscale.resolution.regional import DescribedWindows, RegionalWindows, StructurePrior
from genscale.resolution.rotary import RotaryScaling
from genscale.resolution.sampling import Stage, bicubic, size_step
from genscale.resolution.scale_fusion import ScaleFusion
from genscale.resolution.swin_patches import SwinPatches
from genscale.resolution.windows import WindowConditions


class Cascade(Preset):
    """A preset of several runs."""

    cascade = True
    needs = ("continuous", "pictures")


class SDEdit(Cascade):
    """Enlarge the finished sample, noise it half way and denoise it again (arXiv:2108.01073).

    Args:
        strength: share of the steps that are taken again; 0.2 to 0.5 are usual.
        entropy: keep the entropy of attention where the network has any.
    """

    name = "sdedit"
    uses = ("entropy",)

    def __init__(self, *, strength: float = 0.35, entropy: bool = True) -> None:
        check_share("strength", strength)
        self.strength, self.entropy = strength, entropy

    def strength_of(self, index: int) -> float:
        """Return the same for every run."""
        return self.strength

    def guided(self, model: nn.Module, stage: Stage) -> list[ResolutionOp]:
        """Return entropy-keeping attention, or nothing: the guide is where the run begins."""
        return fitting(model, [EntropyAttention()] if self.entropy else [])


class DemoFusion(Cascade):
    """Windows and interleaved samples, held to the enlarged result (arXiv:2311.16973).

    Every larger run starts at noise. Each step mixes the noised guide in, less and less (c1^e1);
    the network works by overlapping windows, and on interleaved samples of a blurred picture,
    which count less and less (c2^e2). Sizes are 2, 3, ... times the trained one.

    Args:
        exponents: e1 of the guide, e2 of the interleaved samples, e3 of the blur.
        sigma: of the blur at the first step.
        stride: cells between windows; null: half a window.
        jitter: cells by which windows move; null: a quarter of what they overlap by.
        anchor: give the result mean and deviation of the first run's.
        view_batch_size: windows times samples in one call; null: all.
    """

    name = "demofusion"
    interact = False

    def __init__(
        self,
        *,
        exponents: Sequence[float] = (3.0, 1.0, 1.0),
        sigma: float = 1.0,
        stride: int | None = None,
        jitter: int | None = None,
        anchor: bool = True,
        view_batch_size: int | None = None,
    ) -> None:
        if len(exponents) != 3 or min(exponents) < 0:
            raise ConfigError(
                "resolution.exponents must be three numbers of at least 0, for guide, interleaved "
                f"samples and blur, but is {list(exponents)}. Give e.g. [3,1,1]."
            )
        check_count("stride", stride)
        check_count("view_batch_size", view_batch_size)
        self.exponents = tuple(float(value) for value in exponents)
        self.sigma, self.stride, self.jitter = sigma, stride, jitter
        self.anchor, self.view_batch_size = anchor, view_batch_size

    def guided(self, model: nn.Module, stage: Stage) -> list[ResolutionOp]:
        """Return the mixed guide, and the local and global calls."""
        return [
            SkipResidual(stage.guide, stage.noise, exponent=self.exponents[0]),
            self.calls(model, stage),
        ]

    def calls(self, model: nn.Module, stage: Stage) -> LocalGlobal:
        """Return how the network is called."""
        return LocalGlobal(
            exponent=self.exponents[1],
            blur_exponent=self.exponents[2],
            sigma=self.sigma,
            stride=self.stride,
            jitter=self.jitter,
            interact=self.interact,
            unit=size_step(model),
            seed=stage.index,
            view_batch_size=self.view_batch_size,
            conditions=self.conditions(stage),
        )

    def conditions(self, stage: Stage) -> WindowConditions | None:
        """Return what windows are conditioned on; None: as the whole."""
        return None

    def finished(self, latents: Tensor, base: Tensor) -> Tensor:
        """Give the result the statistics of the first run's."""
        return match_statistics(latents, base) if self.anchor else latents


class AccDiffusion(DemoFusion):
    """DemoFusion whose windows have words of their own and whose interleaved samples meet.

    A word is kept in a window where the attention that it gets in the first run covers enough of
    it (arXiv:2407.10738); networks without attention to words have the rest.

    Args:
        coverage: c, the share of a window that a word must cover.
        exponents: see :class:`DemoFusion`.
        sigma: see there.
        stride: see there.
        jitter: see there.
        anchor: see there.
        view_batch_size: see there.
    """

    name = "accdiffusion"
    uses = ("words",)
    interact = True

    def __init__(
        self,
        *,
        coverage: float = 0.3,
        exponents: Sequence[float] = (3.0, 1.0, 1.0),
        sigma: float = 1.0,
        stride: int | None = None,
        jitter: int | None = None,
        anchor: bool = True,
        view_batch_size: int | None = None,
    ) -> None:
        check_share("coverage", coverage)
        super().__init__(
            exponents=exponents,
            sigma=sigma,
            stride=stride,
            jitter=jitter,
            anchor=anchor,
            view_batch_size=view_batch_size,
        )
        self.coverage = coverage

    def watch(self, model: nn.Module, native: Sides) -> WordMaps | None:
        """Watch the attention to words, where there is any."""
        return word_maps(model, native)

    def conditions(self, stage: Stage) -> WindowConditions | None:
        """Return the prompts of windows."""
        maps = None if stage.maps is None else stage.maps.mean(len(stage.guide))
        if maps is None:
            return None
        return PatchPrompts(maps, stage.sides, coverage=self.coverage)


class FreeScale(Cascade):
    """Fused scales of attention, held to the enlarged result (arXiv:2412.09626).

    Its changes of a UNet's convolutions and skips have no counterpart in transformers.

    Args:
        exponent: of the guide's weight.
        restart: share of the steps that a larger run leaves out.
        sigma: of the blur that divides layout from detail.
        blur_channels: parity: blur across neighbouring channels too.
    """

    name = "freescale"
    needs = ("continuous", "pictures", "tokens")
    uses = ("tokens",)
    doubling = True

    def __init__(
        self,
        *,
        exponent: float = 2.0,
        restart: float = 0.3,
        sigma: float = 1.0,
        blur_channels: bool = False,
    ) -> None:
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
    """

    name = "imax"
    uses = ("entropy", "rotary")
    doubling = True

    def __init__(
        self, *, ntk: float = 10.0, shift: float | None = None, swin_patches: bool = True
    ) -> None:
        if shift is not None and shift <= 0.0:
            raise ConfigError(
                f"resolution.shift must be positive, but is {shift}. 1 leaves the times alone."
            )
        self.ntk, self.times_shift, self.swin_patches = ntk, shift, swin_patches

    def shift(self, stage: Stage) -> float:
        """Return the shift of this run."""
        if self.times_shift is not None:
            return self.times_shift
        return linear_factor(stage.native, stage.sides)

    def guided(self, model: nn.Module, stage: Stage) -> list[ResolutionOp]:
        """Return the projection, adapted attention and moved patches."""
        return [
            *adapted_attention(model, self.ntk),
            *([SwinPatches(size_step(model))] if self.swin_patches else []),
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
    """

    name = "hiflow"
    uses = ("entropy", "rotary")
    records = True
    doubling = True

    def __init__(
        self,
        *,
        strengths: Sequence[float] = (16 / 30, 10 / 30),
        alphas: Sequence[float] = (1.0, 0.25),
        betas: Sequence[float] = (0.5, 0.5),
        ratio: float = 0.2,
        ntk: float = 10.0,
        swin_patches: bool = True,
    ) -> None:
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
            *([SwinPatches(size_step(model))] if self.swin_patches else []),
            FlowAligned(
                references,
                alpha=_at(self.alphas, stage.index),
                beta=_at(self.betas, stage.index),
                ratio=self.ratio,
            ),
        ]


class CUpscale(Cascade):
    """Windows with a global structure and words of their own (C-Upscale, arXiv:2505.16976).

    After the paper's description alone; weights and their decay are ours. Every larger run begins
    at the enlarged result, noised; windows are denoised and averaged. The low frequencies of the
    result are held, less and less and ever fewer; words that the first run gave little attention
    in a window's place are left out there; and windows that are described by somebody mix that
    description in.

    Args:
        strength: share of the steps that a larger run takes.
        weight: of the held low frequencies at the first step.
        ratio: of the low-pass filter at the first step.
        screen: a word is left out of a window where its mean attention there is below so much of
            its mean over the picture; 0 leaves none out.
        described: share of the windows' descriptions in the estimate.
        stride: cells between windows; null: half a window.
        view_batch_size: windows times samples in one call; null: all.

    Attributes:
        describe: from pictures of B windows in [-1, 1] to their B captions.
        encode: from captions to conditions. Both are set from Python; without them all windows
            have the prompt of the whole.
    """

    name = "c_upscale"
    uses = ("words",)

    def __init__(
        self,
        *,
        strength: float = 0.6,
        weight: float = 1.0,
        ratio: float = 0.3,
        screen: float = 0.5,
        described: float = 0.3,
        stride: int | None = None,
        view_batch_size: int | None = None,
    ) -> None:
        for name, value in (
            *(("strength", strength), ("weight", weight), ("ratio", ratio)),
            *(("screen", screen), ("described", described)),
        ):
            check_share(name, value)
        check_count("stride", stride)
        check_count("view_batch_size", view_batch_size)
        self.strength, self.weight, self.ratio = strength, weight, ratio
        self.screen, self.described = screen, described
        self.stride, self.view_batch_size = stride, view_batch_size
        self.describe: Callable[[Tensor], Sequence[str]] | None = None
        self.encode: Callable[[Sequence[str]], Conditioning] | None = None

    def strength_of(self, index: int) -> float:
        """Return the same for every run."""
        return self.strength

    def watch(self, model: nn.Module, native: Sides) -> WordMaps | None:
        """Watch the attention to words, where there is any."""
        return word_maps(model, native)

    def guided(self, model: nn.Module, stage: Stage) -> list[ResolutionOp]:
        """Return the windows and the structure."""
        maps = None if stage.maps is None else stage.maps.mean(len(stage.guide))
        screened = None
        if maps is not None and self.screen > 0.0:
            screened = ScreenedPrompts(maps, stage.sides, floor=self.screen)
        described = None
        if self.describe is not None and self.encode is not None and stage.images is not None:
            described = DescribedWindows(
                stage.images(stage.guide), stage.sides, self.describe, self.encode
            )
        return [
            RegionalWindows(
                screened,
                described,
                share=self.described,
                stride=self.stride,
                view_batch_size=self.view_batch_size,
            ),
            StructurePrior(stage.guide, stage.left, weight=self.weight, ratio=self.ratio),
        ]


def word_maps(model: nn.Module, native: Sides) -> WordMaps | None:
    """Return what watches the attention to words, or None where there is none."""
    return WordMaps(model, native) if traits(model).words else None


def adapted_attention(model: nn.Module, ntk: float) -> list[ResolutionOp]:
    """Return entropy-keeping attention and NTK never slower than interpolation, where they fit."""
    return fitting(model, [EntropyAttention(), RotaryScaling("ntk_clip", ntk=ntk)])


def _at(values: Sequence[float], index: int) -> float:
    return values[min(index, len(values) - 1)]
