"""Lightning's strategy of fully sharded training, with the checkpoints of every other strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from genscale.io.weights import load_strictly, read_checkpoint
from genscale.training.parallel import Shards, cut_like, full_value


class FullySharded(ModelParallelStrategy):
    """All processes are one data-parallel group over which everything is sharded (FSDP2).

    A checkpoint is one file that holds what a run of one process would have written: the same
    keys, whole tensors, the optimizer's state by the same numbers. So a run may be continued on
    another number of processes and by another strategy, and sampled wherever it was trained.

    Saving gathers one tensor at a time and keeps it on the CPU of the first process. Loading reads
    the file memory-mapped on every process, and of each tensor the part that is needed.
    """

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def setup_environment(self) -> None:
        """Make the data-parallel group span all processes.

        Lightning's own default makes every GPU of a node a tensor-parallel rank: all would train
        on the same samples.
        """
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def shards(self) -> Shards:
        """How ``configure_model`` cuts networks."""
        mixed = self.precision_plugin.precision == "bf16-mixed"
        return Shards(self.device_mesh["data_parallel"], torch.bfloat16 if mixed else None)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning ask for the optimizer's state, as it asks every other strategy."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather weights and averages on the first process; the others get an empty dict."""
        assert self.lightning_module is not None
        state: dict[str, Any] = self._gathered(self.lightning_module.state_dict())
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather an optimizer's state on the first process; the others get an empty dict."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        state: dict[str, Any] = self._gathered(optimizer.state_dict())
        return state

    def _gathered(self, tree: Any) -> Any:
        if isinstance(tree, dict):
            items = {key: self._gathered(value) for key, value in tree.items()}
            return items if self.is_global_zero else {}
        if isinstance(tree, list | tuple):
            return type(tree)(self._gathered(value) for value in tree)
        if isinstance(tree, Tensor):
            value = full_value(tree.detach())  # all processes take part
            return value.cpu() if self.is_global_zero else None
        return tree

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write one file on the first process; who calls gives it its final name when it is whole.

        It goes straight to disk: Lightning would build a second copy of it in memory.
        """
        if self.is_global_zero:
            torch.save(checkpoint, filepath)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint memory-mapped; nothing in it is run, whatever ``weights_only`` says."""
        return read_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's part of every weight and average."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        parts = {
            name: cut_like(value, own[name]) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        load_strictly(self.lightning_module, parts, source="the checkpoint")

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of every moment."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [n for group in state["param_groups"] for n in group["params"]]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            owner = dict(zip(numbers, parameters, strict=True))
            cut = {
                number: {
                    # of a parameter's shape: a moment; anything else belongs to the whole
                    key: cut_like(value, owner[number])
                    if isinstance(value, Tensor) and value.shape == owner[number].shape
                    else value
                    for key, value in values.items()
                }
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": cut})
