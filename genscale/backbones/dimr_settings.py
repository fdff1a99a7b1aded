"""The settings of a DiMR, branch by branch, and the checks they must pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from genscale.errors import ConfigError, did_you_mean
from genscale.layers.norm import BLOCK_NORMS
from genscale.layers.skip_scale import SkipScaling

BLOCK_TYPES = ("transformer", "convnext")


@dataclass(frozen=True, slots=True)
class BranchSettings:
    """The resolved settings of one branch; the arguments of DiMR explain them."""

    block_type: str
    hidden_size: int
    depth: int
    patch_size: int
    image_ratio: int
    num_heads: int
    kernel_size: int
    mlp_size: int
    head_kernel_size: int
    dropout: float
    skip_scale: SkipScaling
    skip_kappa: float

    @property
    def downsample(self) -> int:
        """Input pixels along one side of a cell of this branch's grid."""
        return self.patch_size * self.image_ratio


def resolve_branches(config: Mapping[str, Any]) -> list[BranchSettings]:
    """Check DiMR's constructor arguments and give each branch its own.

    Raises:
        ConfigError: settings that do not fit together.
    """
    _check_choices(config)
    count = len(config["hidden_sizes"])
    if count == 0:
        raise ConfigError(
            "model.hidden_sizes is empty but a model needs one branch at least. "
            "Give one width a branch, e.g. model.hidden_sizes=[96,32]."
        )

    def spread(name: str, default: Sequence[Any] | None = None) -> list[Any]:
        value = default if config[name] is None else config[name]
        if not isinstance(value, Sequence) or isinstance(value, str):
            return [value] * count
        if len(value) != count:
            raise ConfigError(
                f"model.{name} has {len(value)} entries but model.hidden_sizes has {count}, one "
                f"a branch. Give {count} entries, coarsest branch first."
            )
        return list(value)

    hidden_sizes = spread("hidden_sizes")
    branches = [
        BranchSettings(*values)
        for values in zip(
            spread("block_types", ["transformer"] + ["convnext"] * (count - 1)),
            hidden_sizes,
            spread("depths"),
            spread("patch_sizes"),
            spread("image_ratios"),
            spread("num_heads"),
            spread("kernel_sizes"),
            spread("mlp_sizes", [2 * size for size in hidden_sizes]),
            spread("head_kernel_sizes"),
            spread("dropout"),
            spread("skip_scale"),
            spread("skip_kappa"),
            strict=True,
        )
    ]
    for r, branch in enumerate(branches):
        _check_branch(r, branch, axial_rope=config["position"] == "axial_rope")
    for r, (coarse, fine) in enumerate(pairwise(branches)):
        if coarse.downsample % fine.downsample:
            raise ConfigError(
                f"Branch {r} has cells of {coarse.downsample} pixels and branch {r + 1} of "
                f"{fine.downsample}, which must divide it. Change model.patch_sizes or "
                "model.image_ratios so that each grid refines the one before."
            )
    if config["num_classes"] and all(b.block_type != "transformer" for b in branches):
        raise ConfigError(
            f"model.num_classes is {config['num_classes']} but no branch is a transformer, which "
            "alone sees the class. Set model.num_classes=0, or change model.block_types."
        )
    for name in ("checkpoint_stages", "pyramid_weights"):
        _check_branch_list(name, config[name], count)
    return branches


def _check_choices(config: Mapping[str, Any]) -> None:
    choices = {
        "norm": tuple(BLOCK_NORMS),
        "position": ("learned", "axial_rope"),
        "position_resize": ("interpolate", "crop"),
    }
    for name, known in choices.items():
        if config[name] not in known:
            raise ConfigError(
                f"model.{name} must be one of {', '.join(known)}, but is {config[name]!r}."
                f"{did_you_mean(str(config[name]), known)}"
            )
    for name, least in (("in_channels", 1), ("num_classes", 0)):
        if not isinstance(config[name], int) or config[name] < least:
            raise ConfigError(
                f"model.{name} must be an integer of at least {least}, but is {config[name]}. "
                "Give the number that the data has."
            )


def _check_branch(r: int, branch: BranchSettings, *, axial_rope: bool) -> None:
    """Check the settings of branch ``r`` on their own."""
    if branch.block_type not in BLOCK_TYPES:
        raise ConfigError(
            f"model.block_types[{r}] must be one of {', '.join(BLOCK_TYPES)}, but is "
            f"{branch.block_type!r}.{did_you_mean(str(branch.block_type), BLOCK_TYPES)}"
        )
    positive = {
        "hidden_sizes": branch.hidden_size,
        "patch_sizes": branch.patch_size,
        "image_ratios": branch.image_ratio,
        "mlp_sizes": branch.mlp_size,
    }
    for name, value in positive.items():
        if value < 1:
            raise ConfigError(
                f"model.{name} must be positive, but its entry {r} is {value}. Give 1 or more."
            )
    odd = {"depths": branch.depth, "head_kernel_sizes": branch.head_kernel_size}
    if branch.block_type == "convnext":
        odd["kernel_sizes"] = branch.kernel_size
    for name, value in odd.items():
        if value < 1 or value % 2 == 0:
            raise ConfigError(
                f"model.{name} must be odd, but its entry {r} is {value}. "
                f"Give {max(1, value - 1)} or {max(1, value + 1)}."
            )
    if not 0 <= branch.dropout < 1:
        raise ConfigError(
            f"model.dropout must lie in [0, 1), but its entry {r} is {branch.dropout}. "
            "Give the share of activations to drop, e.g. model.dropout=0.1."
        )
    if branch.block_type == "transformer":
        if branch.num_heads < 1 or branch.hidden_size % branch.num_heads:
            raise ConfigError(
                f"model.hidden_sizes[{r}] is {branch.hidden_size}, which {branch.num_heads} heads "
                "do not divide. Change model.num_heads."
            )
        if axial_rope and branch.hidden_size // branch.num_heads < 4:
            raise ConfigError(
                f"model.position=axial_rope needs 4 channels a head, but branch {r} has "
                f"{branch.hidden_size // branch.num_heads}. Lower model.num_heads."
            )


def _check_branch_list(name: str, value: Sequence[Any] | None, count: int) -> None:
    """Check the two lists that speak of branches without being settings of one."""
    if name == "checkpoint_stages" and any(not 0 <= r < count for r in value or ()):
        raise ConfigError(
            f"model.checkpoint_stages is {list(value or ())} but the branches are 0 to "
            f"{count - 1}. Name branches, 0 being the coarsest."
        )
    if name == "pyramid_weights" and value is not None and len(value) != count:
        raise ConfigError(
            f"model.pyramid_weights has {len(value)} entries but there are {count} branches. "
            "Give one weight a branch, coarsest first."
        )


def trained_size(input_size: int | Sequence[int], downsample: int) -> tuple[int, int]:
    """Return height and width of the trained input."""
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if min(height, width) < 1 or height % downsample or width % downsample:
        raise ConfigError(
            f"model.input_size is {height} x {width}, which must be a multiple of {downsample}, "
            "the coarsest cell. Change it, model.patch_sizes or model.image_ratios."
        )
    return height, width


def default_pyramid_weights(count: int) -> list[float]:
    """Return loss weights from 1/4 (coarsest) to 1 (finest) in equal ratios; [1] for one branch."""
    return [4.0 ** -((count - 1 - r) / max(1, count - 1)) for r in range(count)]
