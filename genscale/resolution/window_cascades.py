"""Cascades whose larger runs look through windows of the trained size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.resolution.applicability import traits
from genscale.resolution.attention_probe import WordMaps
from genscale.resolution.base import ResolutionOp, Sides, linear_factor
from genscale.resolution.cascades import Cascade, Enlarge
from genscale.resolution.flow_guided import SkipResidual
from genscale.resolution.frequency import match_statistics
from genscale.resolution.local_global import LocalGlobal
from genscale.resolution.noise_alignment import noise_map
from genscale.resolution.patch_prompts import PatchPrompts, ScreenedPrompts
from genscale.resolution.presets import check_count, check_share
from genscale.resolution.regional import DescribedWindows, RegionalWindows, StructurePrior
from genscale.resolution.sampling import Stage, size_step
from genscale.resolution.windows import WindowConditions


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
        enlarge: see :class:`Cascade`.
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
        enlarge: Enlarge = "latent",
    ) -> None:
        super().__init__(enlarge)
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

    def called_at(self, model: nn.Module, native: Sides, sides: Sides) -> list[Sides]:
        """Return the size of windows, and that of interleaved samples."""
        factor = max(round(linear_factor(native, sides)), 1)
        rows, columns = (
            -(-side // (factor * unit)) * unit
            for side, unit in zip(sides, size_step(model), strict=True)
        )
        return [native, (rows, columns)]

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
        enlarge: see :class:`Cascade`.
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
        enlarge: Enlarge = "latent",
    ) -> None:
        check_share("coverage", coverage)
        super().__init__(
            exponents=exponents,
            sigma=sigma,
            stride=stride,
            jitter=jitter,
            anchor=anchor,
            view_batch_size=view_batch_size,
            enlarge=enlarge,
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


class LSRNA(DemoFusion):
    """DemoFusion from an inner level, begun with more noise where there is detail.

    Noise of a deviation that follows the density of edges is added to the enlarged result before
    it is noised (arXiv:2503.18446). Its learned enlargement of latents is ``enlarge`` of
    :func:`~genscale.resolution.sampling.sample_scaled`.

    Args:
        strength: share of the steps that a larger run takes (30 of 50 in the paper).
        edge_noise: least and greatest deviation of that noise.
        exponents: see :class:`DemoFusion`.
        sigma: see there.
        stride: see there.
        jitter: see there.
        anchor: see there.
        view_batch_size: see there.
        enlarge: see :class:`Cascade`.
    """

    name = "lsrna"
    needs = ("continuous", "pictures")

    def __init__(
        self,
        *,
        strength: float = 0.6,
        edge_noise: Sequence[float] = (0.0, 1.2),
        exponents: Sequence[float] = (3.0, 1.0, 1.0),
        sigma: float = 1.0,
        stride: int | None = None,
        jitter: int | None = None,
        anchor: bool = True,
        view_batch_size: int | None = None,
        enlarge: Enlarge = "latent",
    ) -> None:
        check_share("strength", strength)
        if len(edge_noise) != 2 or not 0.0 <= edge_noise[0] <= edge_noise[1]:
            raise ConfigError(
                "resolution.edge_noise must be two rising numbers of at least 0, but is "
                f"{list(edge_noise)}. Give e.g. [0,1.2]."
            )
        super().__init__(
            exponents=exponents,
            sigma=sigma,
            stride=stride,
            jitter=jitter,
            anchor=anchor,
            view_batch_size=view_batch_size,
            enlarge=enlarge,
        )
        self.strength = strength
        self.edge_noise = (float(edge_noise[0]), float(edge_noise[1]))

    def strength_of(self, index: int) -> float:
        """Return the same for every run."""
        return self.strength

    def begins_at(self, stage: Stage) -> Tensor:
        """Return the guide with noise where the decoded picture has edges."""
        if stage.images is None:
            raise ConfigError(
                "resolution=lsrna looks at pictures, but no decoder was given. Give images=..., a "
                "function from latents to pictures in [-1, 1]."
            )
        least, most = self.edge_noise
        deviation = noise_map(stage.images(stage.guide), stage.sides, least=least, most=most)
        keys = rng.key(stage.seeds, stage.index + 1, rng.Purpose.RENOISE, 1)
        noise = rng.normal(keys.to(stage.guide.device), tuple(stage.guide.shape[1:]))
        return stage.guide + deviation.to(stage.guide) * noise.to(stage.guide)


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
        enlarge: see :class:`Cascade`.

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
        enlarge: Enlarge = "latent",
    ) -> None:
        super().__init__(enlarge)
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
