"""Several averages at once: tracked, stored, resumed, and updated shard by shard."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from genscale.autoencoders.identity import Identity
from genscale.backbones.dimr import DiMR
from genscale.errors import ConfigError
from genscale.io.weights import read_checkpoint
from genscale.objectives.flow import FlowMatching
from genscale.runs import RunFolder
from genscale.training.callbacks.snapshots import EMASnapshots
from genscale.training.ema import ConstantEMA, PosthocEMA, PowerEMA, SeveralEMA
from genscale.training.lr_schedule import Constant
from genscale.training.module import GenerativeModule
from genscale.training.optim import AdamW
from genscale.training.posthoc import find_snapshots

SEVERAL = SeveralEMA(decays=[0.9, 0.5, 0.75])


def module_of(ema: Any) -> GenerativeModule:
    torch.manual_seed(0)
    model = DiMR(
        input_size=8,
        in_channels=1,
        num_classes=2,
        hidden_sizes=[8],
        depths=[1],
        patch_sizes=[2],
        num_heads=2,
        kernel_sizes=3,
    )
    return GenerativeModule(
        model=model,
        autoencoder=Identity(latent_channels=1),
        objective=FlowMatching(),
        optimizer=AdamW(),
        lr_schedule=Constant(),
        ema=ema,
        batch_size=4,
    )


def move(module: GenerativeModule, steps: int) -> None:
    """Change the weights by hand and update the averages, as training does."""
    for _ in range(steps):
        module.step += 1
        with torch.no_grad():
            for parameter in module.model.parameters():
                parameter += 1.0
        module.update_averages()


class TestLaws:
    def test_every_average_has_its_own_name(self) -> None:
        assert [law.name for law in SEVERAL.laws()] == ["ema_0.9", "ema_0.5", "ema_0.75"]
        assert [law.name for law in PosthocEMA().laws()] == ["ema_0.05", "ema_0.1"]
        assert ConstantEMA(decay=0.999).laws() == (ConstantEMA(decay=0.999),)
        assert PowerEMA(sigma_rel=0.1).name == "ema_0.1"

    def test_the_first_is_the_main_one(self) -> None:
        assert SEVERAL.decay_at(7) == 0.9
        assert SEVERAL.name == "ema_0.9"
        assert SeveralEMA(decays=[0.9], warmup=True).decay_at(1) == pytest.approx(2 / 11)
        assert PosthocEMA(sigma_rels=[0.1, 0.05]).decay_at(9) == PowerEMA(sigma_rel=0.1).decay_at(9)
        assert PosthocEMA(sigma_rels=[0.1, 0.05]).name == "ema_0.1"

    @pytest.mark.parametrize(
        ("law", "settings", "sentence"),
        [
            (SeveralEMA, {"decays": []}, "ema.decays must be a list of different numbers"),
            (SeveralEMA, {"decays": [0.9, 0.9]}, "different numbers, but "),
            (SeveralEMA, {"decays": 0.9}, "different numbers, but 0.9 was given"),
            (SeveralEMA, {"decays": [0.9, 1.0]}, r"must be in \[0, 1\), but 1.0"),
            (PosthocEMA, {"sigma_rels": ["a"]}, "ema.sigma_rels must be a list of different"),
            (PosthocEMA, {"sigma_rels": [0.05, 0.4]}, r"must be in \(0, 0.28\), but 0.4"),
            (PosthocEMA, {"snapshot_every": 0}, "ema.snapshot_every must be a whole number"),
            (PosthocEMA, {"snapshot_dtype": "float15"}, "Did you mean 'float16'"),
        ],
    )
    def test_impossible_laws_are_refused(self, law: Any, settings: Any, sentence: str) -> None:
        with pytest.raises(ConfigError, match=sentence):
            law(**settings)


class TestModule:
    def test_all_follow_the_weights_at_their_own_pace(self) -> None:
        module = module_of(SEVERAL)
        start = next(module.model.parameters()).detach().clone()
        move(module, 3)
        averages = module.averages()
        assert list(averages) == ["ema", "ema_0.5", "ema_0.75"]
        for name, decay in (("ema", 0.9), ("ema_0.5", 0.5), ("ema_0.75", 0.75)):
            # weights are start + 1, 2, 3
            moved = (1 - decay) * (decay**2 * 1 + decay * 2 + 3)
            torch.testing.assert_close(next(averages[name].parameters()), start + moved)

    def test_averages_are_frozen_and_stay_in_eval_mode(self) -> None:
        module = module_of(SEVERAL)
        module.train()
        assert module.model.training
        for average in module.averages().values():
            assert not any(part.training for part in average.modules())
            assert not any(parameter.requires_grad for parameter in average.parameters())
        trained = {
            id(p) for group in AdamW().build(module.model).param_groups for p in group["params"]
        }
        assert trained == {id(parameter) for parameter in module.model.parameters()}

    def test_the_state_dict_holds_all_and_keeps_the_main_ones_names(self) -> None:
        module = module_of(SEVERAL)
        move(module, 2)
        state = module.state_dict()
        prefixes = {name.rpartition(".")[0].split(".")[0] for name in state}
        assert prefixes == {"model", "ema", "further_averages"}
        further = {name.split(".")[1] for name in state if name.startswith("further_averages.")}
        assert further == {"ema_0_5", "ema_0_75"}
        resumed = module_of(SEVERAL)
        resumed.load_state_dict(copy.deepcopy(state))
        resumed.step = module.step
        move(module, 2)
        move(resumed, 2)
        assert all(torch.equal(ours, theirs) for ours, theirs in _pairs(module, resumed))

    def test_one_average_has_the_checkpoint_it_always_had(self) -> None:
        state = module_of(ConstantEMA(decay=0.9)).state_dict()
        assert {name.split(".")[0] for name in state} == {"model", "ema"}


def _pairs(one: nn.Module, other: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    return ((first[name], second[name]) for name in first)


@pytest.fixture
def two_processes() -> Iterator[Any]:
    """Be the second of two processes, of which the other one never answers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


class TestShards:
    def test_a_process_averages_what_it_holds_and_asks_nobody(self, two_processes: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        whole, average = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
        expected = copy.deepcopy(average)
        for network in (model, average):
            fully_shard(network, mesh=two_processes)
        with torch.no_grad():
            for sharded, plain in zip(model.parameters(), whole.parameters(), strict=True):
                assert isinstance(sharded, DTensor)
                sharded.to_local().add_(1.0)
                plain += 1.0
        for network in (model, whole):
            network[1].running_mean.fill_(3.0)
        law = ConstantEMA(decay=0.75)
        with CommDebugMode() as communication:
            law.update(average, model, 5)
        law.update(expected, whole, 5)
        assert communication.get_total_counts() == 0
        for sharded, plain in zip(average.parameters(), expected.parameters(), strict=True):
            local, half = sharded.to_local(), len(plain) // 2
            assert len(local) == half
            assert torch.equal(local, plain[half:])  # the second half is this process's
        assert average[1].running_mean.tolist() == [3.0] * 6


class TestSnapshots:
    def test_they_are_due_every_so_often_and_at_the_end(self, tmp_path: Path) -> None:
        module = module_of(PosthocEMA(snapshot_every=4))
        excluded: list[float] = []
        log: Any = SimpleNamespace(exclude=excluded.append)
        callback = EMASnapshots(RunFolder(tmp_path), module.ema_law, log=log)  # type: ignore[arg-type]
        barriers: list[str] = []
        trainer: Any = SimpleNamespace(
            max_steps=10,
            is_global_zero=True,
            strategy=SimpleNamespace(barrier=barriers.append),
        )
        for _ in range(10):
            move(module, 1)
            callback.on_step(trainer, module)
        found = find_snapshots(tmp_path / "ema_snapshots")
        assert [profile.step for profile in found] == [4, 4, 8, 8, 10, 10]
        assert len(excluded) == len(barriers) == 3
        last = max(found)
        assert last.sigma_rel == 0.1
        state = read_checkpoint(found[last])
        average = module.averages()["ema_0.1"].state_dict()
        assert state.keys() == average.keys()
        assert all(torch.equal(state[name], average[name]) for name in state)
        # a run that resumes at step 8 makes the last ones again
        module.step = 8
        callback.on_train_start(trainer, module)
        assert {profile.step for profile in find_snapshots(tmp_path / "ema_snapshots")} == {4, 8}
