"""LAMB as released with FIT: its rule, what it skips, and tensors that are cut over processes."""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from genscale.errors import ConfigError
from genscale.training.lamb import Lamb, LayerwiseAdam
from genscale.training.lr_schedule import Cosine
from genscale.training.optim import AdamW, OptimizerFactory

SHAPES = {"wide": (7, 5), "row": (9,), "scalar": (1,), "large": (30, 20)}


def model_of(dtype: torch.dtype = torch.float32) -> nn.ParameterDict:
    """Parameters of all kinds; the norm of ``large`` is beyond the clamp, ``scalar`` is 0."""
    draws = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}
    values["scalar"].zero_()
    assert values["large"].norm() > 10.0
    return nn.ParameterDict({name: nn.Parameter(v.to(dtype)) for name, v in values.items()})


def gradients(step: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(1 + step)
    return {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}


def walk(model: nn.ParameterDict, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for name, gradient in gradients(step).items():
            model[name].grad = gradient.to(model[name].dtype)
        optimizer.step()


class TestRule:
    def test_every_step_is_the_written_one(self) -> None:
        model = model_of(torch.float64)
        expected = {name: p.detach().clone() for name, p in model.items()}
        law = Lamb(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, clamp=10.0)
        walk(model, law.build(model), range(4))
        for name, p in expected.items():
            m, v = torch.zeros_like(p), torch.zeros_like(p)
            for step in range(4):
                g = gradients(step)[name].double()
                m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
                u = m / (v.sqrt() + 1e-6) + 0.1 * p  # moments are not corrected for their start
                r = min(float(p.norm()), 10.0) / float(u.norm())
                p -= 0.01 * (r if r > 0 else 1.0) * u
            assert torch.allclose(model[name], p, rtol=1e-12, atol=1e-14), name

    def test_a_step_is_as_long_as_its_tensor(self) -> None:
        model = model_of()
        before = {name: p.detach().clone() for name, p in model.items()}
        walk(model, Lamb(lr=0.02, weight_decay=0.0).build(model), range(1))
        moved = {name: float((p.detach() - before[name]).norm()) for name, p in model.items()}
        assert moved["wide"] == pytest.approx(0.02 * float(before["wide"].norm()), rel=1e-5)
        assert moved["large"] == pytest.approx(0.02 * 10.0, rel=1e-5)
        # a tensor of zeros has no length to go by: u itself, m / sqrt(v) = 0.1 / sqrt(0.01)
        assert moved["scalar"] == pytest.approx(0.02 * 0.1 / math.sqrt(0.01), rel=1e-5)

    def test_the_schedule_sets_its_rate(self) -> None:
        model = model_of()
        optimizer = Lamb(lr=0.02).build(model)
        schedule = Cosine(warmup_steps=2, final_scale=0.3).build(optimizer, 10)
        rates = []
        for step in range(10):
            rates.append(optimizer.param_groups[0]["lr"])
            walk(model, optimizer, range(step, step + 1))
            schedule.step()
        assert rates[:3] == pytest.approx([0.01, 0.02, 0.02])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * 0.02)


class TestSkipping:
    def test_a_marked_step_changes_neither_weights_nor_moments(self) -> None:
        model = model_of()
        optimizer = Lamb().build(model)
        walk(model, optimizer, range(2))
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
        optimizer.step()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        for number, moments in optimizer.state_dict()["state"].items():
            for name, moment in moments.items():
                assert torch.equal(moment, state["state"][number][name])

    def test_a_mark_of_zero_changes_nothing(self) -> None:
        marked, plain = model_of(), model_of()
        optimizer = Lamb().build(marked)
        optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
        walk(marked, optimizer, range(3))
        walk(plain, Lamb().build(plain), range(3))
        assert all(torch.equal(marked[name], plain[name]) for name in SHAPES)


def test_an_interrupted_run_goes_on_to_the_same_bits() -> None:
    whole, first = model_of(), model_of()
    walk(whole, Lamb().build(whole), range(5))
    optimizer = Lamb().build(first)
    walk(first, optimizer, range(3))
    second = model_of()
    second.load_state_dict(first.state_dict())
    resumed = Lamb().build(second)
    resumed.load_state_dict(optimizer.state_dict())
    walk(second, resumed, range(3, 5))
    assert all(torch.equal(whole[name], second[name]) for name in SHAPES)


def test_factories_are_alike() -> None:
    laws: list[OptimizerFactory] = [AdamW(lr=0.1, weight_decay=0.5), Lamb(lr=0.1, weight_decay=0.5)]
    for law in laws:
        optimizer = law.build(model_of())
        assert [group["lr"] for group in optimizer.param_groups] == [0.1]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5]
    assert isinstance(optimizer, LayerwiseAdam)
    with pytest.raises(ConfigError, match=r"optim.lr must be positive, but 0 was given"):
        Lamb(lr=0)
    with pytest.raises(ConfigError, match=r"optim.betas must be two numbers in \[0, 1\)"):
        Lamb(betas=(1.0, 0.9))
    with pytest.raises(ConfigError, match=r"optim.clamp must be positive, but 0 was given"):
        Lamb(clamp=0)


def test_a_closure_is_evaluated_with_gradients() -> None:
    model = model_of()
    optimizer = Lamb().build(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in model.values()]).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert float(optimizer.step(closure).detach()) < float(first.detach())


def _child() -> None:
    """Take steps with parameters cut over two processes, one left whole; print the weights."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))

    def cut(name: str, value: torch.Tensor) -> torch.Tensor:
        # a scalar lies on the first process alone; ``row`` is on both
        return value if name == "row" else distribute_tensor(value, mesh, [Shard(0)])

    model = nn.ParameterDict({n: nn.Parameter(cut(n, p.data)) for n, p in model_of().items()})
    optimizer = Lamb().build(model)
    for step in range(3):
        for name, gradient in gradients(step).items():
            model[name].grad = cut(name, gradient)
        optimizer.step()
    whole = {n: p.full_tensor() if n != "row" else p for n, p in model.items()}
    if dist.get_rank() == 1:
        print(json.dumps({name: p.flatten().tolist() for name, p in whole.items()}))
    dist.destroy_process_group()


@pytest.mark.dist
def test_a_cut_tensor_counts_by_its_whole_norm(subprocess_environment: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            env={**subprocess_environment, **group, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [child.communicate(timeout=90) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    found = json.loads(outputs[1][0])
    model = model_of()
    walk(model, Lamb().build(model), range(3))
    for name, parameter in model.items():  # to the last bit
        assert found[name] == parameter.flatten().tolist(), name


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    _child()
