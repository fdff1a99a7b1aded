"""The settings of a LaMamba, stage by stage, and the checks they must pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genscale.errors import ConfigError, did_you_mean
from genscale.layers.scan import SCAN_KINDS, ScanKind

NUM_STAGES = 4
DOWNSAMPLES = ("merge", "conv2", "conv3")


@dataclass(frozen=True, slots=True)
class StageSettings:
    """The resolved settings of the blocks on one level; the arguments of LaMamba explain them."""

    hidden_size: int
    num_heads: int
    window_size: int
    scan: ScanKind
    state_size: int
    expansion: float
    step_rank: int | None
    kernel_size: int
    conv_bias: bool
    mlp_ratio: float
    modulation_rank: int | None


@dataclass(frozen=True, slots=True)
class Layout:
    """The resolved settings of a whole model.

    Attributes:
        grid: rows and columns of the finest grid at the trained size.
        cells: number of cells of each stage's grid there.
        stages: settings of the encoder stages, finest first; the decoder mirrors them.
        depths: blocks of each encoder stage.
        bottleneck_depth: blocks in the middle.
        decoder_depths: blocks of each decoder stage, coarsest first.
    """

    grid: tuple[int, int]
    cells: list[int]
    stages: list[StageSettings]
    depths: list[int]
    bottleneck_depth: int
    decoder_depths: list[int]


def resolve_layout(config: Mapping[str, Any]) -> Layout:
    """Check LaMamba's constructor arguments and give each stage its own.

    Raises:
        ConfigError: settings that do not fit together.
    """
    _check_choices(config)
    _check_numbers(config)
    size, patch = config["input_size"], config["patch_size"]
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1 or height % patch or width % patch:
        raise ConfigError(
            f"model.input_size is {height} x {width}, which must be a multiple of "
            f"model.patch_size, {patch}. Change one of them."
        )
    widths = _spread(config, "hidden_sizes")
    heads, depths = _spread(config, "num_heads"), _spread(config, "depths")
    # a stage without blocks has none on the way back either
    default = [depth + 1 if depth else 0 for depth in reversed(depths)]
    decoder = default if config["decoder_depths"] is None else _spread(config, "decoder_depths")
    for i, (hidden, count) in enumerate(zip(widths, heads, strict=True)):
        if hidden < 1 or count < 1 or hidden % count:
            raise ConfigError(
                f"model.hidden_sizes[{i}] is {hidden}, which {count} heads do not divide. "
                "Change model.num_heads."
            )
    expected = [factor * widths[0] for factor in (1, 2, 4, 4)]
    if widths != expected:
        raise ConfigError(
            f"model.hidden_sizes is {widths}, but widths must double twice and then stay, as the "
            f"decoder halves them. Give {expected}."
        )
    if widths[0] % 4:
        raise ConfigError(
            f"model.hidden_sizes[0] is {widths[0]}, which must be a multiple of 4: positions have "
            "a sine and a cosine for each axis. Change it."
        )
    shared = [
        config[name]
        for name in ("scan", "state_size", "expansion", "step_rank", "kernel_size", "conv_bias",
                     "mlp_ratio", "modulation_rank")
    ]  # fmt: skip
    grid = height // patch, width // patch
    grids = [[-(-side // factor) for side in grid] for factor in (1, 2, 4, 4)]
    stages = [
        StageSettings(hidden, count, min(config["window_size"], side), *shared)
        for hidden, count, side in zip(widths, heads, map(max, grids), strict=True)
    ]
    cells = [rows * columns for rows, columns in grids]
    return Layout(grid, cells, stages, depths, config["bottleneck_depth"], decoder)


def _spread(config: Mapping[str, Any], name: str) -> list[int]:
    """Return one value a stage."""
    value = config[name]
    if not isinstance(value, Sequence):
        return [value] * NUM_STAGES
    if len(value) != NUM_STAGES:
        raise ConfigError(
            f"model.{name} has {len(value)} entries but there are {NUM_STAGES} stages. "
            "Give one entry a stage."
        )
    return list(value)


def _check_choices(config: Mapping[str, Any]) -> None:
    for name, known in (("scan", SCAN_KINDS), ("downsample", DOWNSAMPLES)):
        if config[name] not in known:
            raise ConfigError(
                f"model.{name} must be one of {', '.join(known)}, but is {config[name]!r}."
                f"{did_you_mean(str(config[name]), known)}"
            )


def _check_numbers(config: Mapping[str, Any]) -> None:
    least = {"in_channels": 1, "num_classes": 0, "patch_size": 1, "bottleneck_depth": 0,
             "window_size": 1, "state_size": 1, "kernel_size": 1}  # fmt: skip
    for name, minimum in least.items():
        if not isinstance(config[name], int) or config[name] < minimum:
            raise ConfigError(
                f"model.{name} must be an integer of at least {minimum}, but is {config[name]}. "
                "Change it."
            )
    for name in ("step_rank", "modulation_rank"):
        if config[name] is not None and config[name] < 1:
            raise ConfigError(
                f"model.{name} must be at least 1, or null, but is {config[name]}. Change it."
            )
    for name in ("depths", "decoder_depths"):
        values = config[name] if isinstance(config[name], Sequence) else [config[name] or 0]
        if any(value < 0 for value in values):
            raise ConfigError(
                f"model.{name} must not be negative, but is {list(values)}. "
                "Give the number of blocks of each stage."
            )
    if config["kernel_size"] % 2 == 0:
        raise ConfigError(
            f"model.kernel_size must be odd, but is {config['kernel_size']}. "
            f"Give {config['kernel_size'] - 1} or {config['kernel_size'] + 1}."
        )
    for name in ("expansion", "mlp_ratio"):
        if not config[name] > 0:
            raise ConfigError(f"model.{name} must be positive, but is {config[name]}. Give e.g. 2.")
    wrong = [i for i in config["checkpoint_stages"] if not 0 <= i < NUM_STAGES]
    if wrong:
        raise ConfigError(
            f"model.checkpoint_stages holds {wrong[0]} but the stages are 0 to {NUM_STAGES - 1}. "
            "Name stages, 0 being the finest."
        )
