"""Metric state that is a set of samples: merged over processes, in order of the sample ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from genscale.errors import DataError, ParallelError


class KeyedMetric(Metric):
    """Collects rows of named tensors under sample ids.

    Rows that come twice (a padded last batch) are dropped by their id, and everything is sorted by
    id before it is used: the result does not depend on how samples were dealt out over processes
    and batches.

    Attributes:
        measures: names of what is computed.
        active: those of them that the reference allows.
        details: further numbers of each measure of the last result.
        num_samples: different samples in the last result.
        num_duplicates: rows dropped from it because their id came twice.

    Args:
        measures: names of what is computed.
        rows: number of axes (the leading sample axis included) and type of each named tensor.
    """

    full_state_update = True
    ids: list[Tensor]

    def __init__(self, measures: Sequence[str], rows: dict[str, tuple[int, torch.dtype]]) -> None:
        super().__init__()
        self.measures = tuple(measures)
        self.active = self.measures
        self.details: dict[str, dict[str, Any]] = {}
        self._rows = dict(rows)
        self.add_state("ids", default=[], dist_reduce_fx=None)
        for name in self._rows:
            self.add_state(f"rows_{name}", default=[], dist_reduce_fx=None)
        self.num_samples = 0
        self.num_duplicates = 0

    def _append(self, sample_ids: Tensor | None, count: int, rows: dict[str, Tensor]) -> None:
        self.ids.append(self._check_ids(sample_ids, count).to(self.device))
        for name, value in rows.items():
            dtype = self._rows[name][1]
            getattr(self, f"rows_{name}").append(value.detach().to(self.device, dtype))

    def _check_ids(self, sample_ids: Tensor | None, count: int) -> Tensor:
        if sample_ids is None:
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                raise ParallelError(
                    "Several processes evaluate, but no sample_ids were given, so duplicates could "
                    "not be told. Pass the global numbers of the samples."
                )
            start = sum(len(each) for each in self.ids)
            return torch.arange(start, start + count)
        if sample_ids.shape != (count,):
            raise DataError(
                f"{count} images came with sample_ids of shape {tuple(sample_ids.shape)}. "
                "Give one id an image."
            )
        return sample_ids.to(torch.int64)

    def collected(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the ids ``(n,)``, ascending and unique, and the rows in that order, on the CPU."""
        ids = _join(self.ids)
        if len(ids) == 0:
            raise DataError(
                f"{type(self).__name__} has seen no samples. Call update before compute."
            )
        sorted_ids, order = torch.sort(ids, stable=True)
        first = torch.ones_like(sorted_ids, dtype=torch.bool)
        first[1:] = sorted_ids[1:] != sorted_ids[:-1]
        self.num_samples = int(first.sum())
        self.num_duplicates = int((~first).sum())
        chosen = order[first]
        rows = {name: _join(getattr(self, f"rows_{name}"))[chosen] for name in self._rows}
        return sorted_ids[first], rows

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the state of all processes; a process without samples joins with none."""
        if dist.is_available() and dist.is_initialized():
            if dist.get_backend() == "nccl" and self.device.type != "cuda":
                self.to(torch.device("cuda", torch.cuda.current_device()))  # nccl gathers no other
            # one tensor each, so that every process gathers the same number of tensors
            self.ids = [_consolidate(self.ids, 1, torch.int64, self.device)]
            for name, (dims, dtype) in self._rows.items():
                parts = getattr(self, f"rows_{name}")
                setattr(self, f"rows_{name}", [_consolidate(parts, dims, dtype, self.device)])
        super().sync(*args, **kwargs)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Take the samples of another metric of the same kind in; the other stays as it was.

        Raises:
            DataError: if the other metric is of another kind.
        """
        if type(incoming_state) is not type(self):
            raise DataError(
                f"A {type(self).__name__} cannot take in a {type(incoming_state).__name__}. "
                "Merge metrics of one kind."
            )
        self._computed = None
        self._update_count += incoming_state._update_count
        for name in ("ids", *(f"rows_{each}" for each in self._rows)):
            own: list[Tensor] = getattr(self, name)
            own.extend(value.to(self.device) for value in getattr(incoming_state, name))


def _join(parts: list[Tensor] | Tensor) -> Tensor:
    """Concatenate on the CPU, leaving out the parts of processes without samples."""
    if isinstance(parts, Tensor):
        return parts.cpu()
    filled = [part.cpu() for part in parts if len(part)]
    return torch.cat(filled) if filled else torch.zeros(0, dtype=torch.int64)


def _consolidate(
    parts: list[Tensor], dims: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if parts:
        return torch.cat(parts)
    return torch.zeros((0,) * dims, dtype=dtype, device=device)
