"""Averages of any length after training, from snapshots of two of them (arXiv:2312.02696, C.3).

An average with a power-function profile p(t) ~ t^g on [0, t_i] is a vector in the space of
functions of training time. The profile that is wanted is projected onto the stored ones, and the
stored weights are added up with the coefficients of that projection.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from genscale.errors import CheckpointError, ConfigError
from genscale.io.files import atomic_write
from genscale.training.ema import PowerEMA
from genscale.training.parallel import full_value

_SNAPSHOT = re.compile(r"ema_(?P<width>[0-9.e-]+)_step-(?P<step>\d+)\.safetensors$")


@dataclass(frozen=True, slots=True, order=True)
class Profile:
    """The profile of a power-function average: p(t) = (g + 1) t^g / step^(g + 1) on [0, step].

    Args:
        step: where it ends.
        sigma_rel: its standard deviation as a share of ``step``.
    """

    step: int
    sigma_rel: float

    @property
    def gamma(self) -> float:
        """The exponent g."""
        return PowerEMA(sigma_rel=self.sigma_rel).gamma

    @property
    def file_name(self) -> str:
        """Name of its snapshot."""
        return f"{PowerEMA(sigma_rel=self.sigma_rel).name}_step-{self.step:08d}.safetensors"


@dataclass(frozen=True, slots=True)
class Combination:
    """How a profile is put together from stored ones.

    Attributes:
        coefficients: ``(n,)`` float64, one a stored profile; their sum is 1.
        residual: distance of the combination from the profile, as a share of the profile's norm.
    """

    coefficients: Tensor
    residual: float


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> Tensor:
    """Return the integrals of p_i(t) q_j(t) over training time, ``(n, m)`` float64.

    In closed form (g_i + 1)(g_j + 1) / (g_i + g_j + 1) (s / l)^g / l with the shorter time s, the
    longer one l and the exponent g of the profile that ends there; no power of a large number
    is taken, so that long exponents do not overflow.
    """
    (times, gammas), (other_times, other_gammas) = _numbers(first), _numbers(second)
    times, gammas = times[:, None], gammas[:, None]
    longer = torch.maximum(times, other_times)
    ratio = torch.minimum(times, other_times) / longer
    exponent = torch.where(times < other_times, other_gammas, gammas)
    factor = (gammas + 1) * (other_gammas + 1) / (gammas + other_gammas + 1)
    return factor * ratio**exponent / longer


def _numbers(profiles: Sequence[Profile]) -> tuple[Tensor, Tensor]:
    exponents = {p.sigma_rel: p.gamma for p in profiles}
    times = torch.tensor([p.step for p in profiles], dtype=torch.float64)
    gammas = torch.tensor([exponents[p.sigma_rel] for p in profiles], dtype=torch.float64)
    return times, gammas


def combine(stored: Sequence[Profile], wanted: Profile) -> Combination:
    """Find the combination of stored profiles nearest to ``wanted`` in the L2 norm.

    The coefficients are divided by their sum, so that weights that never moved come back as they
    are; the sum differs from 1 by less than the residual.
    """
    gram = inner_products(stored, stored)
    right = inner_products(stored, [wanted])[:, 0]
    scale = gram.diagonal().rsqrt()  # unit profiles: the system is then as well posed as it can be
    scaled = gram * scale[:, None] * scale
    solution = scale * torch.linalg.solve(scaled, scale * right)
    solution = solution / solution.sum()
    norm = inner_products([wanted], [wanted])[0, 0]
    square = norm - 2 * solution @ right + solution @ gram @ solution
    return Combination(solution, float((square.clamp(min=0) / norm).sqrt()))


def save_snapshot(
    average: nn.Module, profile: Profile, folder: Path, *, dtype: torch.dtype, write: bool = True
) -> None:
    """Write an average's tensors as one file; a sharded one is gathered, on all processes at once.

    Args:
        average: the averaged network.
        profile: what it is the average of.
        folder: made if missing.
        dtype: of floating-point parameters; buffers are kept as they are.
        write: whether this process writes.
    """
    averaged = {name for name, _ in average.named_parameters(remove_duplicate=False)}
    state = {}
    for name, tensor in average.state_dict().items():
        whole = full_value(tensor)
        if write:
            kind = dtype if name in averaged and whole.is_floating_point() else whole.dtype
            state[name] = whole.detach().to("cpu", kind, copy=True).contiguous()
    if write:
        copied = json.dumps([name for name in state if name not in averaged])
        with atomic_write(folder / profile.file_name) as temporary:
            save_file(state, temporary, metadata={"copied": copied})


def find_snapshots(folder: Path) -> dict[Profile, Path]:
    """Return the snapshots of a folder by profile, earliest first."""
    found = {}
    for path in folder.glob("ema_*.safetensors"):
        match = _SNAPSHOT.match(path.name)
        if match:
            found[Profile(int(match["step"]), float(match["width"]))] = path
    return dict(sorted(found.items()))


def choose_snapshots(
    folder: Path, sigma_rels: Sequence[float], step: int | None
) -> tuple[dict[Profile, Path], list[Profile]]:
    """Return the snapshots up to a step, and the profiles that are wanted of them.

    Args:
        folder: where the snapshots are.
        sigma_rels: relative widths that are wanted.
        step: where the profiles end: a step that has snapshots; None for the last one.

    Raises:
        ConfigError: a width outside (0, 0.28).
        CheckpointError: no snapshots, or none of ``step``.
    """
    for width in sigma_rels:
        if not 0.0 < width < 0.28:
            raise ConfigError(
                f"sigma_rel must lie in (0, 0.28), but {width} was given. Give e.g. "
                "sigma_rel=[0.08]."
            )
    known = find_snapshots(folder)
    if not known:
        raise CheckpointError(
            f"No snapshots of averages in {folder}: ema_*_step-*.safetensors were expected. "
            "Train with ema=posthoc."
        )
    steps = sorted({profile.step for profile in known})
    last = steps[-1] if step is None else step
    if last not in steps:
        raise CheckpointError(
            f"No snapshots of step {last} in {folder}; there are steps "
            f"{', '.join(map(str, steps))}. Give one of these, or leave step out."
        )
    used = {profile: path for profile, path in known.items() if profile.step <= last}
    return used, [Profile(last, width) for width in sigma_rels]


def reconstruct(
    snapshots: Mapping[Profile, Path], combinations: Sequence[Combination]
) -> list[dict[str, Tensor]]:
    """Add snapshots up, in float64; the results are float32.

    Args:
        snapshots: files by profile; buffers come from the last one.
        combinations: one a result, of these profiles in this order.

    Raises:
        CheckpointError: a file is damaged, or of another model than the others.
    """
    coefficients = torch.stack([each.coefficients for each in combinations])  # (results, files)
    results: list[dict[str, Tensor]] = [{} for _ in combinations]
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in snapshots.values()]
        names = list(files[-1].keys())
        copied = set(json.loads((files[-1].metadata() or {}).get("copied", "[]")))
        for path, file in zip(snapshots.values(), files, strict=True):
            if set(file.keys()) != set(names):
                raise CheckpointError(
                    f"{path} holds other tensors than {list(snapshots.values())[-1]}: snapshots of "
                    "one model were expected. Remove those of the other model."
                )
        for name in names:
            last = files[-1].get_tensor(name)
            if name in copied or not last.is_floating_point():
                for result in results:
                    result[name] = last.clone()
                continue
            total = torch.zeros(len(results), *last.shape, dtype=torch.float64)
            for column, file in zip(coefficients.T, files, strict=True):
                value = file.get_tensor(name).double()
                total += column.view(-1, *[1] * value.dim()) * value
            for result, value in zip(results, total.float(), strict=True):
                result[name] = value.clone()
    return results


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or no snapshot: a complete safetensors file was expected. "
            "Remove it; the others suffice."
        ) from error


def save_average(
    state: dict[str, Tensor], path: Path, *, profile: Profile, combination: Combination
) -> None:
    """Write a reconstructed average, atomically, with what it is."""
    metadata = {
        "sigma_rel": str(profile.sigma_rel),
        "step": str(profile.step),
        "snapshots": str(len(combination.coefficients)),
        "residual": f"{combination.residual:.3g}",
    }
    with atomic_write(path) as temporary:
        save_file(state, temporary, metadata=metadata)


def drop_later(folder: Path, step: int) -> list[Path]:
    """Remove snapshots past ``step``, which a resumed run makes again, and parts of such files."""
    later = [path for profile, path in find_snapshots(folder).items() if profile.step > step]
    torn = list(folder.glob(".ema_*.safetensors"))
    for path in (*later, *torn):
        path.unlink(missing_ok=True)
    return later
