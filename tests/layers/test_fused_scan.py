"""The Triton kernels of the selective scan: interpreted on a CPU, compiled for GPUs, run on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.layers.scan import fused, kernels, scan_grid, scan_orders, selective_scan
from genscale.layers.scan.fused import fused_scan
from genscale.layers.ss2d import SS2D

# everything in float32: rounding over a few dozen steps. Inputs in bfloat16 are exact in float32,
# but the interpreter truncates what a GPU rounds: a unit in the last of 8 bits, which gradients see
EXACT, ROUNDED = 2e-6, 2e-2
CASES = {
    "one state, groups, more steps than a tile": EXACT,
    "three states, channels that fill no block": EXACT,
    "sixteen states, groups": EXACT,
    "one step": EXACT,
    "no softplus": EXACT,
    "nothing optional": EXACT,
    "constant vectors": EXACT,
    "long steps": EXACT,
    "steps of zero": 0.0,
    "two pieces": EXACT,
    "continuous grid, one state": EXACT,
    "cross grid, three states": EXACT,
    "module": EXACT,
    "bfloat16": ROUNDED,
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[float]]:
    """Differences of all cases, from one process that interprets the kernels."""
    # the interpreter of older ones does not get along with NumPy 2.4
    pytest.importorskip("triton", minversion="3.7", reason="interpreting needs triton 3.7")
    script = Path(__file__).with_name("interpreted_scans.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result: dict[str, list[float]] = json.loads(run.stdout)
    return result


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_equal_the_reference(
    interpreted: dict[str, list[float]], case: str
) -> None:
    """Outputs, last states and all gradients, each relative to its largest entry."""
    assert max(interpreted[case]) <= CASES[case]
    assert set(interpreted) == set(CASES)


@pytest.mark.parametrize("kernel", ["scan_forward", "scan_backward"])
def test_kernels_compile_for_a_gpu_that_is_not_here(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes more than the compiler does; this needs no device."""
    triton = pytest.importorskip("triton", reason="the kernels need triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = dict(zip(("scan_forward", "scan_backward"), fused._compiled(), strict=True))[kernel]
    constants = {"STEPS": 64, "BLOCK": 16, "STATES": 1, "SOFTPLUS": True}
    signature: dict[str, Any] = {}
    for name in function.arg_names:
        if name.isupper():
            signature[name] = "constexpr"
            constants.setdefault(name, True)  # HAS_...: everything there is
        elif name.endswith("_ptr"):
            signature[name] = "*i64" if name == "paths_ptr" else "*fp32"
        else:
            signature[name] = ("i32",) * 4 if name.endswith("_s") else "i32"
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): v for name, v in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared < 48 * 1024  # what every device grants


def test_the_kernels_module_needs_no_triton() -> None:
    """Bodies are plain functions until the first launch."""
    code = "import sys, genscale.layers.scan.fused; print('triton' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"
    expected = {"then", "softplus", "load_tile", "find_cells", "scan_tile", "scan_tile_backwards"}
    assert set(fused.HELPERS) == expected
    assert all(callable(getattr(kernels, name)) for name in fused.HELPERS)


def test_operators_know_their_shapes_without_running() -> None:
    """What torch.compile is told about outputs and gradients, on the meta device."""
    shapes = {"u": (2, 5, 1, 4), "delta": (2, 5, 3, 4), "A": (3, 4, 2)}
    vectors = (2, 5, 3, 2)
    values = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    inputs = [value.requires_grad_() for value in values.values()]
    inputs += [torch.empty(vectors, device="meta", requires_grad=True) for _ in range(2)]
    y, last = fused_scan(*inputs, softplus=True)
    assert (y.shape, last.shape) == ((2, 5, 3, 4), (2, 3, 4, 2))
    grads = torch.autograd.grad(y.sum() + last.sum(), inputs)
    assert [grad.shape for grad in grads] == [value.shape for value in inputs]


# on a GPU


def random_scan(dtype: torch.dtype, states: int, length: int = 300) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, half: bool = True) -> Tensor:
        value = torch.randn(*shape, generator=generator)
        return value.to("cuda", dtype if half else torch.float32).requires_grad_()

    return {
        "u": draw(2, 40, length),
        "delta": draw(2, 40, length),
        "A": (-draw(40, states, half=False).exp()).detach().requires_grad_(),
        "B": draw(2, 2, states, length),
        "C": draw(2, 2, states, length),
        "D": draw(40, half=False),
        "z": draw(2, 40, length),
        "delta_bias": draw(40, half=False),
        "initial_state": draw(2, 40, states, half=False),
    }


def everything(values: dict[str, Tensor], implementation: Any) -> list[Tensor]:
    y, last = selective_scan(**values, delta_softplus=True, implementation=implementation)  # type: ignore[arg-type]
    loss = y.float().square().mean() + last.sin().mean()
    return [y, last, *torch.autograd.grad(loss, list(values.values()))]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("states", [1, 3, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_on_a_gpu_the_kernel_equals_torch_operations(
    states: int, dtype: torch.dtype, tolerance: float
) -> None:
    values = random_scan(dtype, states)
    assert_close(everything(values, "triton"), everything(values, "chunked"), tolerance)


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_is_deterministic_and_compiles_into_one_graph() -> None:
    values = random_scan(torch.float32, 1)
    eager = everything(values, "triton")
    assert all(torch.equal(a, b) for a, b in zip(everything(values, "triton"), eager, strict=True))
    torch._dynamo.reset()

    def scan() -> Tensor:
        return selective_scan(**values, delta_softplus=True, implementation="triton")[0]  # type: ignore[arg-type]

    assert torch.equal(torch.compile(scan, fullgraph=True)(), eager[0])


@pytest.mark.gpu
def test_on_a_gpu_paths_over_a_grid_equal_gathered_orders() -> None:
    torch.manual_seed(0)
    module, x = SS2D(24, state_size=2).cuda(), torch.randn(2, 9, 13, 24, device="cuda")
    orders, inverses = scan_orders("continuous", 9, 13, x.device)
    wide, vectors = (4, 48, 2), (2, 117, 4, 2)
    sizes = ((2, 117, 48), vectors, wide, wide, vectors, vectors, (4, 48))
    inputs = [torch.randn(*size, device="cuda") for size in sizes]
    inputs[3] = -inputs[3].exp()
    *first, bias = (value.requires_grad_() for value in inputs)
    results = []
    for implementation in ("triton", "chunked"):
        y = scan_grid(*first, orders, inverses, bias=bias, implementation=implementation)  # type: ignore[arg-type]
        results.append([y, *torch.autograd.grad(y.square().mean(), [*first, bias])])
    assert_close(results[0], results[1], 1e-4)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        rounded = module(x)
    assert (rounded.float() - module(x)).norm() / module(x).norm() < 0.02
