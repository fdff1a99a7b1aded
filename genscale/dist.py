"""Several processes sampling or evaluating one set: who does what, and how parts come together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous


def initialise() -> tuple[int, int]:
    """Join the group described by ``RANK``/``WORLD_SIZE`` (torchrun, SLURM); return both.

    One process without these variables is (0, 1) and needs no group.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return dist.get_rank(), world_size


def launched() -> int:
    """Return how many processes a launcher outside has started: torchrun, srun, or a person."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))  # set by srun alone


def may_be_first() -> bool:
    """Return whether this process can turn out to be the first, as far as its launcher has said.

    Can be asked before there is a group: of torchrun (``RANK``), SLURM and Lightning's own
    launcher, whichever started it.
    """
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    names = ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


_STORES: list[Any] = []  # the first process's store serves the others until it ends


def agree(name: str, value: Callable[[], str]) -> str:
    """Return what ``value`` gives on the first process, on all that were launched from outside.

    Needs no process group, so that it can be asked before one is made: the value goes through
    the store at ``MASTER_ADDR``:``MASTER_PORT``, where the group will be made too.
    """
    if launched() == 1 or "RANK" not in os.environ:
        return value()
    store, rank, _ = next(rendezvous("env://"))
    _STORES.append(store)
    if rank == 0:
        store.set(f"genscale/{name}", value())
    return str(store.get(f"genscale/{name}").decode())


def gather_objects(value: Any) -> list[Any]:
    """Return every process's value, in rank order, on every process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def gather_rows(ids: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """Join rows of all processes and sort them by id; every process gets them all."""
    parts = gather_objects((ids.cpu(), *[column.cpu() for column in columns]))
    joined = [torch.cat(items) for items in zip(*parts, strict=True)]
    order = torch.argsort(joined[0])
    return tuple(item[order] for item in joined)


def finish() -> None:
    """Leave the group, if one was joined."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
