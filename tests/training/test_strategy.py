"""The strategy of sharded training: who shards, and how; runs are tests/integration."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from genscale.training.strategy import FullySharded


def trainer_of(precision: str = "32-true", **options: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        strategy=FullySharded(),
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        **options,  # type: ignore[arg-type]
    )


def test_all_processes_share_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, Lightning would let all processes of a machine read the same batch."""
    strategy = trainer_of(devices=2, num_nodes=3).strategy
    assert isinstance(strategy, FullySharded)
    # what Lightning does next: start a group, and arrange it by these two numbers
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", lambda self: None)
    strategy.setup_environment()
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (6, 1)


@pytest.mark.parametrize(
    ("precision", "expected"), [("32-true", None), ("bf16-mixed", torch.bfloat16)]
)
def test_what_autocast_does_is_known(precision: str, expected: torch.dtype | None) -> None:
    strategy = trainer_of(precision, devices=1).strategy
    assert isinstance(strategy, FullySharded)
    strategy._device_mesh = {"data_parallel": "the mesh"}  # type: ignore[assignment]
    assert strategy.shards.autocast is expected
    assert strategy.shards.mesh == "the mesh"


def test_only_the_first_process_writes(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = trainer_of(devices=1).strategy
    for rank, expected in ((0, {"a": [1, None], "b": {"c": 2.0}}), (1, {})):
        strategy.cluster_environment = SimpleNamespace(global_rank=lambda rank=rank: rank)
        found = strategy._gathered({"a": [1, None], "b": {"c": torch.tensor(2.0)}})
        assert found == expected
        strategy.save_checkpoint({"rank": rank}, f"{tmp_path}/file")
    assert torch.load(f"{tmp_path}/file", weights_only=True) == {"rank": 0}
