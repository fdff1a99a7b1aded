"""Which implementation of a scan runs, the adapter to mamba_ssm, and walks along paths on a CPU."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.layers.scan import backends, scan_grid, scan_orders, selective_scan, walk
from genscale.layers.scan.backends import (
    choose_implementation,
    mamba_obstacle,
    official_scan,
    triton_obstacle,
)
from genscale.layers.scan.grid import MOST_WALKED_STATES
from genscale.layers.ss2d import SS2D

CPU = torch.device("cpu")
ORDER = ("mamba_ssm", "triton", "chunked")


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


# the choice


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENSCALE_SCAN", raising=False)


@pytest.mark.parametrize(
    ("obstacles", "expected"),
    [
        ({}, "mamba_ssm"),
        ({"mamba_ssm": "it is not there"}, "triton"),
        ({"mamba_ssm": "it is not there", "triton": "nor is this"}, "chunked"),
    ],
)
def test_auto_takes_the_first_that_can_run(obstacles: dict[str, Any], expected: str) -> None:
    assert choose_implementation("auto", obstacles, ORDER, device="cuda") == expected


def test_the_environment_says_what_auto_means_and_an_argument_overrides_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GENSCALE_SCAN", "reference")
    assert choose_implementation("auto", {}, ORDER, device="cuda") == "reference"
    assert choose_implementation("triton", {}, ORDER, device="cuda") == "triton"
    u, delta, B, C = (draw(1, size, 3, seed=size) for size in (2, 2, 1, 1))
    y, _ = selective_scan(u, delta, -torch.ones(2, 1), B, C)
    (grad,) = torch.autograd.grad(y.sum(), u, create_graph=True)
    assert grad.requires_grad  # the reference alone is differentiable twice
    monkeypatch.setenv("GENSCALE_SCAN", "mamba_ssm")
    with pytest.raises(ConfigError, match=r"GENSCALE_SCAN=mamba_ssm cannot run this scan: .*cpu"):
        selective_scan(u, delta, -torch.ones(2, 1), B, C)
    meta = (value.to("meta") for value in (u, delta, -torch.ones(2, 1), B, C))
    assert selective_scan(*meta)[0].is_meta  # operations are counted whatever will run
    monkeypatch.setenv("GENSCALE_SCAN", "tritton")
    with pytest.raises(ConfigError, match=r"GENSCALE_SCAN must .* Did you mean 'triton'"):
        choose_implementation("auto", {}, ORDER, device="cuda")


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backends._log.cache_clear()
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        for _ in range(3):
            choose_implementation("auto", {}, ("triton",), device="some device")
    assert [record.getMessage() for record in caplog.records] == [
        "selective scans on some device run as 'triton' (GENSCALE_SCAN overrides)"
    ]


@pytest.mark.parametrize("name", ["triton", "mamba_ssm"])
def test_a_backend_that_cannot_run_says_why(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_is_installed", lambda package: True)
    values = [draw(1, 2, 3, seed=i) for i in range(2)]
    vectors = [draw(1, 1, 3, seed=i) for i in (3, 4)]
    sentence = f"implementation={name} cannot run this scan: it needs a CUDA device"
    with pytest.raises(ConfigError, match=sentence):
        selective_scan(*values, -torch.ones(2, 1), *vectors, implementation=name)


def test_reasons_against_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_is_installed", lambda package: package == "triton")
    assert triton_obstacle("cuda", double=False) is None
    assert "float64" in str(triton_obstacle("cuda", double=True))
    assert "on cpu" in str(triton_obstacle("cpu", double=False))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_obstacle("cpu", double=False) is None

    backends._official_obstacle.cache_clear()
    arguments: dict[str, Any] = {"double": False, "num_states": 16, "initial": False}
    assert "not installed" in str(mamba_obstacle("cuda", **arguments))
    assert "float64" in str(mamba_obstacle("cuda", **{**arguments, "double": True}))
    assert "initial state" in str(mamba_obstacle("cuda", **{**arguments, "initial": True}))
    assert "256" in str(mamba_obstacle("cuda", **{**arguments, "num_states": 300}))
    monkeypatch.setattr(backends, "_is_installed", lambda package: False)
    assert "not installed" in str(triton_obstacle("cuda", double=False))
    backends._official_obstacle.cache_clear()


# the adapter, with a stand-in that has the official function's signature and demands


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module like ``mamba_ssm.ops.selective_scan_interface``, whose function is ours."""

    def selective_scan_fn(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any = None, z: Any = None,
        delta_bias: Any = None, delta_softplus: bool = False, return_last_state: bool = False,
    ) -> Any:  # fmt: skip
        assert all(value.is_contiguous() for value in (u, delta, A, B, C))
        assert A.dtype == torch.float32
        assert delta.dtype == u.dtype
        y, last = selective_scan(
            u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
            implementation="reference",
        )  # fmt: skip
        assert return_last_state
        return y, last

    packages = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    modules = {name: ModuleType(name) for name in packages}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    interface = modules[packages[-1]]
    setattr(modules["mamba_ssm.ops"], "selective_scan_interface", interface)  # noqa: B010
    setattr(interface, "selective_scan_fn", selective_scan_fn)  # noqa: B010
    setattr(interface, "selective_scan_cuda", object())  # noqa: B010
    for cached in (backends._official_obstacle, backends._is_installed):
        cached.cache_clear()
        monkeypatch.setattr(backends, cached.__name__, cached.__wrapped__)
    return interface


def test_mamba_ssm_counts_only_with_its_operator(official: ModuleType) -> None:
    arguments: dict[str, Any] = {"double": False, "num_states": 16, "initial": False}
    assert mamba_obstacle("cuda", **arguments) is None
    official.selective_scan_cuda = None  # type: ignore[attr-defined]
    assert "without its CUDA operator" in str(mamba_obstacle("cuda", **arguments))


def test_the_adapter_hands_over_what_the_operator_wants(official: ModuleType) -> None:
    u, delta = (draw(5, 2, 4, seed=i).permute(1, 2, 0) for i in range(2))  # time first in memory
    A, B, C = -draw(4, 3, seed=2).exp(), draw(2, 2, 3, 5, seed=3), draw(2, 2, 3, 5, seed=4)
    D, bias = draw(4, seed=5), draw(4, seed=6)
    y, last = official_scan(u, delta, A, B, C, D, None, bias, True)
    expected, _ = selective_scan(u, delta, A, B, C, D=D, delta_bias=bias, delta_softplus=True)
    torch.testing.assert_close(y, expected)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="does not differentiate the last state"):
        last.sum().backward()


# scans along paths


def grid_inputs(
    batch: int, height: int, width: int, channels: int, states: int, dtype: torch.dtype
) -> list[Tensor]:
    cells = height * width
    shapes = (
        *((batch, cells, channels), (batch, cells, 4, 2), (4, channels, 2)),
        *((4, channels, states), (batch, cells, 4, states), (batch, cells, 4, states)),
        (4, channels),
    )
    values = [draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    values[3] = (-values[3].exp()).detach().requires_grad_()
    return values


def run_grid(
    inputs: list[Tensor], kind: Any, height: int, width: int, implementation: Any
) -> list[Tensor]:
    *first, bias = inputs
    tables = scan_orders(kind, height, width, CPU)
    y = scan_grid(*first, *tables, bias=bias, implementation=implementation)  # type: ignore[misc]
    return [y, *torch.autograd.grad((y + 0.3).square().mean(), inputs)]


@pytest.mark.parametrize("states", [1, 3, MOST_WALKED_STATES + 1])
@pytest.mark.parametrize(
    ("kind", "height", "width"), [("continuous", 3, 5), ("cross", 4, 2), ("continuous", 1, 1)]
)
@pytest.mark.parametrize("cut", [False, True])
def test_walks_equal_scans_of_gathered_cells(
    kind: str, height: int, width: int, states: int, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cut:  # blocks of one sample and two channels, or one at the edge
        monkeypatch.setattr(walk, "BLOCK_SIZE", 1)
        monkeypatch.setattr(walk, "STEP_SIZE", 2)
    inputs = grid_inputs(2, height, width, 3, states, torch.float32)
    results = [
        run_grid(inputs, kind, height, width, implementation)
        for implementation in ("auto", "reference")
    ]
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() <= 2e-6 * expected.abs().max().clamp_min(1e-3)


def test_gradients_of_walks_in_double_precision() -> None:
    *first, bias = grid_inputs(1, 2, 3, 2, 2, torch.float64)
    tables = scan_orders("continuous", 2, 3, CPU)

    def function(*values: Tensor) -> Tensor:
        return scan_grid(*values[:6], *tables, bias=values[6])

    assert torch.autograd.gradcheck(function, (*first, bias))


def test_walks_are_registered_as_torch_wants_it() -> None:
    x, low, weight, A, B, C, bias = grid_inputs(1, 2, 2, 2, 1, torch.float32)
    paths = scan_orders("cross", 2, 2, CPU)[0]
    operator = torch.ops.genscale.walk.default
    torch.library.opcheck(operator, (x, low, weight, bias, A, B, C, paths))


def test_walks_take_long_and_vanishing_steps() -> None:
    """softplus(-200) is zero in float32: nothing is read; softplus(200) forgets all before."""
    x, low, weight, A, B, C, bias = (v.detach() for v in grid_inputs(1, 2, 3, 2, 1, torch.float32))
    tables = scan_orders("cross", 2, 3, CPU)
    nothing = torch.zeros_like(weight)
    still = scan_grid(x, low, nothing, A, B, C, *tables, bias=torch.full_like(bias, -200.0))
    assert not still.any()
    far = torch.full_like(bias, 200.0).requires_grad_()
    y = scan_grid(x, low, nothing, torch.full_like(A, -16.0), B, C, *tables, bias=far)
    torch.testing.assert_close(y, 200 * x * (B * C).sum((2, 3))[..., None])
    (grad,) = torch.autograd.grad(y.square().mean(), far)
    assert torch.isfinite(grad).all()


def test_a_grid_scan_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    module, x = SS2D(4), draw(1, 2, 3, 4, seed=0)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(run(x).square().sum(), x)[0] for run in (module, compiled)]
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("index", "shape", "sentence"),
    [
        (0, (2, 6), r"x and A must have shapes \(B, L, E\)"),
        (1, (1, 4, 6, 2), r"low must have shape \(1, 6, 4, 2\) .* but has \(1, 4, 6, 2\)"),
        (2, (2, 4, 2), r"weight must have shape \(4, 2, 2\)"),
        (4, (1, 6, 4, 2), r"B must have shape \(1, 6, 4, 1\)"),
        (6, (2, 4), r"bias must have shape \(4, 2\)"),
    ],
)
def test_grids_that_do_not_fit_are_refused(
    index: int, shape: tuple[int, ...], sentence: str
) -> None:
    inputs = grid_inputs(1, 2, 3, 2, 1, torch.float32)
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=sentence):
        run_grid(inputs, "cross", 2, 3, "auto")
