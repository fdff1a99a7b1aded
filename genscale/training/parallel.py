"""What a network goes through before it trains at scale: recomputed, compiled, sharded blocks.

The order is fixed: recomputed activations, then ``block.compile()``, then one shard a block, then
one for what is left of the model. Each of the three changes the modules in place, leaves the names
of parameters as they are, and does nothing where it was done before.

Sharding (FSDP2) cuts every parameter along its first axis, one part a process. Before a block
runs, its parts are gathered; after it, they are dropped again. Weights, gradients, averages and
moments of the optimizer then take 1/N of the memory on each of N processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from genscale.backbones.base import Backbone
from genscale.errors import ParallelError


@dataclass(frozen=True, slots=True)
class Shards:
    """How parameters are cut.

    Args:
        mesh: the processes, one axis.
        autocast: the type in which the model is trained under autocast; None where it is not.
    """

    mesh: DeviceMesh
    autocast: torch.dtype | None = None


# modules that autocast runs in half precision on all devices, with all they own
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def scale_out(
    model: Backbone,
    averages: Sequence[Backbone] = (),
    *,
    checkpoint_blocks: bool = False,
    compile_blocks: bool = False,
    shards: Shards | None = None,
) -> None:
    """Prepare a model, and averages of it, for training at scale; calling again changes nothing.

    Args:
        model: the network that is trained.
        averages: its frozen copies: sharded like it, in float32, and never recomputed or compiled.
        checkpoint_blocks: recompute activations of blocks in the backward pass.
        compile_blocks: compile every block in place.
        shards: cut all parameters over processes; None leaves them whole.
    """
    if checkpoint_blocks:
        checkpoint_activations(model)
    if compile_blocks:
        for block in blocks_of(model):
            if block._compiled_call_impl is None:
                block.compile()
    if shards is not None:
        shard(model, shards)
        for average in averages:
            shard(average, Shards(shards.mesh), keep_root=False)


def blocks_of(model: Backbone) -> list[nn.Module]:
    """Return the modules named in ``block_classes``, blocks inside a block before it."""

    def is_block(module: nn.Module) -> bool:
        # a sharded module has a class of its own, derived from the one it had
        return any(kind.__name__ in model.block_classes for kind in type(module).__mro__)

    return [module for module in reversed(list(model.modules())) if is_block(module)]


def checkpoint_activations(model: Backbone) -> None:
    """Let every block keep its input alone and compute the rest again in the backward pass.

    A backbone with a switch of its own (``gradient_checkpointing``) is asked to turn it on; it
    knows whether its blocks draw random numbers. In any other one, each block is wrapped, and the
    generator's state is kept for the second computation.
    """
    if model._supports_gradient_checkpointing:
        model.enable_gradient_checkpointing()
        return
    for block in blocks_of(model):
        if "forward" not in vars(block):
            block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, **named)

    return run


def shard(model: Backbone, shards: Shards, *, keep_root: bool = True) -> None:
    """Cut a model's parameters over the processes of a mesh, block by block.

    The first process's weights and buffers are sent to all others, whatever these hold: a sharded
    run starts from the bits of a run of one process, and processes other than the first may build
    the model on the meta device. So one copy of the whole model is needed, in the host memory of
    the first process; on the devices, no more than one block is whole at a time.

    The weights that the optimizer sees are float32, and gradients are reduced in float32. A block
    all of whose parameters autocast would round anyway is gathered in that type: half the traffic,
    and the same numbers. Any other one is gathered in float32, as is what belongs to no block: the
    scale of a norm or the rates of a scan, rounded, would make another network. Nor are inputs
    cast here: a time rounded to bfloat16 is another time.

    Args:
        model: on the CPU, the device of the mesh, or meta.
        shards: how.
        keep_root: leave what belongs to no block gathered between forward and backward. Without a
            backward pass it would never be dropped.

    Raises:
        ParallelError: the first process has no weights to send.
    """
    if isinstance(model, FSDPModule):
        return
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    half = MixedPrecisionPolicy(
        param_dtype=shards.autocast, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks_of(model):
        _send_from_first(block, shards.mesh)
        policy = half if _is_cast_whole(block) else full
        fully_shard(block, mesh=shards.mesh, mp_policy=policy)
    _send_from_first(model, shards.mesh)
    fully_shard(
        model,
        mesh=shards.mesh,
        mp_policy=full,
        reshard_after_forward=None if keep_root else True,
    )


def _is_cast_whole(block: nn.Module) -> bool:
    owners = [m for m in block.modules() if next(m.parameters(recurse=False), None) is not None]
    return all(isinstance(owner, _CAST) for owner in owners)


@torch.no_grad()
def _send_from_first(unit: nn.Module, mesh: DeviceMesh) -> None:
    """Give all processes the first one's tensors of ``unit``, sharded parts of it left out."""
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    group = mesh.get_group()
    placed: dict[int, nn.Parameter | Tensor] = {}  # a tensor may belong to several modules

    def send(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            if dist.get_rank(group) == 0:
                raise ParallelError(
                    "The first process holds no weights: its model was built on the meta device. "
                    "Build it with real weights there; the other processes receive them."
                )
            data = torch.empty_like(tensor, device=device)
        else:
            data = tensor.detach().to(device)
        dist.broadcast(data, src=dist.get_global_rank(group, 0), group=group)
        return data

    for module in _modules_unsharded(unit):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in placed:
                placed[id(parameter)] = nn.Parameter(send(parameter), parameter.requires_grad)
            module._parameters[name] = placed[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in placed:
                placed[id(buffer)] = send(buffer)
            module._buffers[name] = placed[id(buffer)]


def _modules_unsharded(unit: nn.Module) -> Iterator[nn.Module]:
    yield unit
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _modules_unsharded(child)


@contextmanager
def whole(models: Iterable[nn.Module]) -> Iterator[None]:
    """Hold all weights of sharded models on every process, so that each may run them as it likes.

    Inside, a forward pass needs no other process: one may sample and the rest wait, or all sample
    unlike shares. All processes enter and leave together. It takes the memory of the whole models
    on every process, in float32 for averages; models that are not sharded are left as they are.
    """
    sharded = [model for model in models if isinstance(model, FSDPModule)]
    units = [unit for model in sharded for unit in model.modules() if isinstance(unit, FSDPModule)]
    for model in sharded:
        model.set_reshard_after_forward(False)
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
        for model in sharded:
            model.set_reshard_after_forward(True)


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; any other one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_value(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every process (all take part); any other one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole ``value`` that this process holds of ``like``, without sending.

    Every process must have the same ``value``. Where that is a memory-mapped file, only the part
    is read, and only the part goes to the device.
    """
    if not isinstance(like, DTensor):
        return value
    mesh, (placement,) = like.device_mesh, like.placements
    assert isinstance(placement, Shard)
    rank, parts = mesh.get_local_rank(), value.chunk(mesh.size(), placement.dim)
    # of few rows, the last processes hold none
    part = parts[rank] if rank < len(parts) else value.narrow(placement.dim, 0, 0)
    return DTensor.from_local(
        part.to(like.device, copy=True),
        mesh,
        like.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients together, a float32 scalar that is the same everywhere.

    Squares are summed in float64: the rounded result then does not depend on how the gradients
    are cut, and a sharded run is clipped by the bits that clip a whole one.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    square = _sum_of_squares([g for g in gradients if not isinstance(g, DTensor)])
    if sharded:
        part = _sum_of_squares([g.to_local() for g in sharded])
        part = part.to(sharded[0].device)  # a process may hold no part of any
        dist.all_reduce(part, group=sharded[0].device_mesh.get_group())
        square = square.to(part.device) + part
    return square.sqrt().float()


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64)
    norms: Any = torch._foreach_norm(filled, 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their common norm is at most ``limit``; return it as it was.

    A norm that is not finite is returned, and what it leaves of the gradients has no meaning.
    """
    held = [p for p in parameters if p.grad is not None]
    norm = gradient_norm(held)
    if limit != float("inf") and held:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local_part(p.grad) for p in held if p.grad is not None], factor)
    return norm
