"""Published methods of resolution scaling, put together from operators.

A preset is settings only. One of one run gives operators for sampling at the wanted size from
noise; a cascade (:mod:`genscale.resolution.cascades`) samples at the trained size first and lets
the result guide larger runs. Operators that a network has nothing for (rotary scaling without
rotary positions) are left out where the method lives without them; networks that lack what a
method cannot do without are refused (:mod:`genscale.resolution.applicability`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import Family
from genscale.resolution.applicability import refusal, traits
from genscale.resolution.base import ResolutionOp, Sides
from genscale.resolution.dilated import (
    SDXL_LAYERS,
    WEAK_LAYERS,
    DilatedConvs,
    NoiseDampedConvs,
)
from genscale.resolution.entropy import EntropyAttention
from genscale.resolution.fourier import FouriScaleBranches
from genscale.resolution.rotary import WATERSHED, RotaryScaling, RotaryVariant
from genscale.resolution.windows import WindowFusion
from genscale.samplers.base import Sampler, State

if TYPE_CHECKING:
    from genscale.resolution.sampling import Stage


class Preset:
    """What is done to sample at another size.

    Attributes:
        name: as ``resolution=`` has it.
        needs: traits a network must have (:class:`~genscale.resolution.applicability.Traits`).
        uses: traits it makes use of where they are.
        family: whose samplers a cascade takes, ``"diffusion"`` or ``"scale_wise"``.
        cascade: whether it goes from a run at the trained size to larger ones.
        whole: whether operators follow the steps of whole samples or spread calls over windows,
            which samplers of blocks of frames have not.
        records: whether larger runs read the estimates of the run before, step by step.
        doubling: whether a cascade's sizes double, rather than grow by the trained size.
        enlarge: how a cascade's results become guides, ``"latent"`` or ``"pixel"``.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[tuple[str, ...]] = ()
    family: ClassVar[Family] = "diffusion"
    cascade: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    records: ClassVar[bool] = False
    doubling: ClassVar[bool] = False
    enlarge: Literal["latent", "pixel"] = "latent"

    def operators(self, model: nn.Module, native: Sides, target: Sides) -> list[ResolutionOp]:
        """Return fresh operators for a run at ``target``; those on the network alone of cascades.

        Args:
            model: the network.
            native: height and width it was trained on.
            target: those wanted.
        """
        return []

    def called_at(self, model: nn.Module, native: Sides, sides: Sides) -> list[Sides]:
        """Return the sizes at which a larger run of size ``sides`` calls the network."""
        return [sides]

    def watch(self, model: nn.Module, native: Sides) -> AbstractContextManager[Any] | None:
        """Return what is to be active in the run at the trained size; None: nothing."""
        return None

    def strength_of(self, index: int) -> float:
        """Return the share of all steps that the ``index``-th larger run takes."""
        return 1.0

    def time_shift(self, stage: Stage) -> float:
        """Return by how much the larger run's time grid is moved towards noise; 1: not."""
        return 1.0

    def begins_at(self, stage: Stage) -> Tensor:
        """Return the clean latents that a larger run begins at, noised."""
        return stage.guide

    def opened(self, solver: Sampler, view: Any, state: State, stage: Stage) -> State:
        """Return where a larger run of a scale-wise model begins, which started empty.

        Args:
            solver: the sampler.
            view: the network's view at the larger size, guidance included.
            state: as the sampler starts it.
            stage: the enlargement.
        """
        return state

    def guided(self, model: nn.Module, stage: Stage) -> list[ResolutionOp]:
        """Return fresh operators of a larger run."""
        raise NotImplementedError(f"{type(self).__name__} must implement guided")  # abstract

    def finished(self, latents: Tensor, base: Tensor) -> Tensor:
        """Return what becomes of a larger run's latents; ``base`` are those of the first run."""
        return latents

    @property
    def label(self) -> str:
        """What protocols call it: the name, and what differs from its defaults."""
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name, parameter in inspect.signature(type(self)).parameters.items()
            if _plain(getattr(self, name)) != _plain(parameter.default)
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


def operators_of(
    preset: Preset, model: nn.Module, native: Sides, target: Sides
) -> list[ResolutionOp]:
    """Return the operators of a preset of one run, for callers that step it themselves.

    Raises:
        ConfigError: the preset does not fit the network, or takes several runs.
    """
    problem = refusal(model, preset)
    if problem is not None:
        raise ConfigError(problem)
    if preset.cascade:
        raise ConfigError(
            f"resolution={preset.name} samples small first and then larger, which takes several "
            "runs where there is one. Use resolution=entropy, sample without a search, or call "
            "genscale.resolution.sample_scaled."
        )
    return preset.operators(model, native, target)


def fitting(model: nn.Module, operators: Sequence[ResolutionOp]) -> list[ResolutionOp]:
    """Return those operators that the network has something for."""
    has = traits(model)
    missing: dict[type, bool] = {EntropyAttention: not has.entropy, RotaryScaling: not has.rotary}
    return [op for op in operators if not missing.get(type(op), False)]


class NoScaling(Preset):
    """Sample at the wanted size and leave it at that."""

    name = "none"


class Entropy(Preset):
    """Attention whose entropy is that of training (arXiv:2306.08645).

    Args:
        unit: see :class:`~genscale.resolution.entropy.EntropyAttention`.
    """

    name = "entropy"
    needs = ("entropy",)
    uses = ("entropy",)

    def __init__(self, *, unit: float | None = None) -> None:
        self.unit = unit

    def operators(self, model: nn.Module, native: Sides, target: Sides) -> list[ResolutionOp]:
        """Return one operator."""
        return [EntropyAttention(self.unit)]


class Rotary(Preset):
    """Scaled rotary positions, with entropy-keeping attention where there is any.

    Args:
        variant: see :func:`~genscale.resolution.rotary.axis_frequencies`.
        ntk: factor of the base; null: the side over the trained side.
        entropy: keep the entropy of attention too.
    """

    name = "ntk"
    needs = ("rotary",)
    uses = ("rotary", "entropy")

    def __init__(
        self, *, variant: RotaryVariant = "ntk", ntk: float | None = None, entropy: bool = True
    ) -> None:
        RotaryScaling(variant)  # refuses unknown names
        self.variant, self.ntk, self.entropy = variant, ntk, entropy

    def operators(self, model: nn.Module, native: Sides, target: Sides) -> list[ResolutionOp]:
        """Return one operator or two."""
        ops: list[ResolutionOp] = [EntropyAttention()] if self.entropy else []
        return fitting(model, [*ops, RotaryScaling(self.variant, ntk=self.ntk)])


class Lumina(Preset):
    """Time-aware rotary positions and proportional attention (Lumina-Next, arXiv:2406.18583).

    Positions are interpolated while the layout forms, then their base grows instead.

    Args:
        watershed: time at which the layout is done, 0 at noise and 1 at data.
        ntk: factor of the base then; null: the side over the trained side.
    """

    name = "lumina"
    whole = True
    needs = ("rotary", "continuous")
    uses = ("rotary", "entropy")

    def __init__(self, *, watershed: float = WATERSHED, ntk: float | None = None) -> None:
        check_share("watershed", watershed)
        self.watershed, self.ntk = watershed, ntk

    def operators(self, model: nn.Module, native: Sides, target: Sides) -> list[ResolutionOp]:
        """Return both operators."""
        rotary = RotaryScaling("time_aware", ntk=self.ntk, watershed=self.watershed)
        return fitting(model, [EntropyAttention(), rotary])


class MultiDiffusion(Preset):
    """One picture from overlapping windows of the trained size (arXiv:2302.08113).

    Args:
        stride: cells of latents between windows; null: half a window.
        jitter: see :func:`~genscale.resolution.windows.jittered`.
        view_batch_size: windows times samples in one call; null: all.
    """

    name = "multidiffusion"
    whole = True
    needs = ("continuous",)

    def __init__(
        self, *, stride: int | None = None, jitter: int = 0, view_batch_size: int | None = None
    ) -> None:
        check_count("stride", stride)
        check_count("view_batch_size", view_batch_size)
        self.stride, self.jitter, self.view_batch_size = stride, jitter, view_batch_size

    def operators(self, model: nn.Module, native: Sides, target: Sides) -> list[ResolutionOp]:
        """Return the windows."""
        return [
            WindowFusion(
                stride=self.stride, jitter=self.jitter, view_batch_size=self.view_batch_size
            )
        ]


class ScaleCrafter(Preset):
    """Convolutions of a UNet that see as far as in training (arXiv:2310.07702).

    At 4096 x 4096 the paper has ``progressive``, ``dilate_tau`` and ``ndcfg_tau`` of 35.

    Args:
        layers: shell patterns of convolutions' names; null: those of SDXL.
        dilate_tau: step from which nothing is dilated.
        progressive: dilate less from step to step, as for 4 times the trained side.
        dilation: null: the side over the trained side.
        ndcfg_tau: step up to which guidance is noise-damped; 0: never. See
            :class:`~genscale.resolution.dilated.NoiseDampedConvs`.
        weak_layers: patterns of those that stay dilated in its base; null: those in the middle.
    """

    name = "scalecrafter"
    needs = ("unet",)
    uses = ("unet",)

    def __init__(
        self,
        *,
        layers: Sequence[str] | None = None,
        dilate_tau: int = 30,
        progressive: bool = False,
        dilation: float | None = None,
        ndcfg_tau: int = 0,
        weak_layers: Sequence[str] | None = None,
    ) -> None:
        check_count("dilate_tau", dilate_tau)
        check_count("ndcfg_tau", ndcfg_tau or None)
        if weak_layers is not None and not ndcfg_tau:
            raise ConfigError(
                f"resolution.weak_layers={list(weak_layers)} is of noise-damped guidance, but "
                "ndcfg_tau=0 leaves it out. Give e.g. resolution.ndcfg_tau=35."
            )
        self.layers = None if layers is None else tuple(layers)
        self.dilate_tau, self.progressive, self.dilation = dilate_tau, progressive, dilation
        self.ndcfg_tau = ndcfg_tau
        self.weak_layers = None if weak_layers is None else tuple(weak_layers)

    def operators(self, model: nn.Module, native: Sides, target: Sides) -> list[ResolutionOp]:
        """Return the dilated convolutions."""
        layers = SDXL_LAYERS if self.layers is None else self.layers
        settings: dict[str, Any] = {
            "dilation": self.dilation,
            "until": self.dilate_tau,
            "progressive": self.progressive,
        }
        if not self.ndcfg_tau:
            return [DilatedConvs(layers, **settings)]
        weak = WEAK_LAYERS if self.weak_layers is None else self.weak_layers
        return [NoiseDampedConvs(layers, weak_layers=weak, damped_until=self.ndcfg_tau, **settings)]


class FouriScale(Preset):
    """Dilated convolutions behind a low-pass filter, in a UNet (arXiv:2403.12963).

    Batches are those of guidance, unconditional and conditional; see
    :class:`~genscale.resolution.fourier.FouriScaleBranches`.

    Args:
        layers: shell patterns of convolutions' names; null: those of SDXL.
        start_step: step up to which the dilation is whole.
        stop_step: step from which nothing is dilated.
        value: what the filter leaves of high frequencies.
    """

    name = "fouriscale"
    needs = ("unet",)
    uses = ("unet",)

    def __init__(
        self,
        *,
        layers: Sequence[str] | None = None,
        start_step: int = 20,
        stop_step: int = 35,
        value: float = 0.6,
    ) -> None:
        check_share("value", value)
        if not 0 <= start_step < stop_step:
            raise ConfigError(
                f"resolution.stop_step must come after resolution.start_step, but they are "
                f"{stop_step} and {start_step}. Give e.g. 20 and 35."
            )
        self.layers = None if layers is None else tuple(layers)
        self.start_step, self.stop_step, self.value = start_step, stop_step, value

    def operators(self, model: nn.Module, native: Sides, target: Sides) -> list[ResolutionOp]:
        """Return the filtered convolutions."""
        return [
            FouriScaleBranches(
                SDXL_LAYERS if self.layers is None else self.layers,
                value=self.value,
                start=self.start_step,
                stop=self.stop_step,
            )
        ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def check_share(name: str, value: float) -> None:
    """Refuse what is no share.

    Raises:
        ConfigError: a number outside [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise ConfigError(
            f"resolution.{name} must lie between 0 and 1, but is {value}. Give e.g. 0.5."
        )


def check_count(name: str, value: int | None) -> None:
    """Refuse what is no number of things.

    Raises:
        ConfigError: neither None nor a whole number of at least 1.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(
            f"resolution.{name} must be a whole number of at least 1, but is {value!r}. "
            "Leave it out for the default."
        )


def presets() -> dict[str, type[Preset]]:
    """Return all presets by name."""
    from genscale.resolution.cascades import FreeScale, HiFlow, IMax, SDEdit
    from genscale.resolution.hidiffusion import HiDiffusion
    from genscale.resolution.pyramid import Pyramid
    from genscale.resolution.window_cascades import LSRNA, AccDiffusion, CUpscale, DemoFusion

    kinds: tuple[type[Preset], ...] = (
        *(NoScaling, Entropy, Rotary, Lumina, MultiDiffusion),
        *(SDEdit, DemoFusion, AccDiffusion, LSRNA, FreeScale, IMax, HiFlow, CUpscale),
        Pyramid,
        *(ScaleCrafter, FouriScale, HiDiffusion),
    )
    return {kind.name: kind for kind in kinds}


def preset_named(name: str) -> Preset:
    """Return a preset with its defaults.

    Raises:
        ConfigError: an unknown name.
    """
    known = presets()
    if name not in known:
        raise ConfigError(
            f"resolution must be one of {', '.join(known)}, but is {name!r}."
            f"{did_you_mean(name, tuple(known))}"
        )
    return known[name]()
