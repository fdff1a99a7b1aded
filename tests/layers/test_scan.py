"""Scans: every implementation against the sequential one, gradients, states, orders, blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.layers.mamba2 import Mamba2, Mamba2State
from genscale.layers.scan import SCAN_KINDS, permute_rows, scan_orders, selective_scan, ssd
from genscale.layers.scan.recurrence import recur, recur_in_lanes, recur_reference
from genscale.layers.ss2d import SS2D, initial_step_bias

CPU = torch.device("cpu")


def arguments(
    batch: int = 2,
    channels: int = 6,
    length: int = 37,
    states: int = 3,
    groups: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Everything a selective scan can be given, all of it random and differentiable."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    values = {
        "u": draw(batch, channels, length),
        "delta": draw(batch, channels, length),
        "A": -draw(channels, states).exp(),
        "B": draw(batch, groups, states, length),
        "C": draw(batch, groups, states, length),
        "D": draw(channels),
        "z": draw(batch, channels, length),
        "delta_bias": draw(channels),
        "initial_state": draw(batch, channels, states),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def scan(values: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor]:
    return selective_scan(**values, **{"delta_softplus": True, **settings})  # type: ignore[arg-type]


def loss_grads(values: dict[str, Tensor], **settings: Any) -> list[Tensor]:
    """Output, last state, and gradients of a loss that uses both."""
    y, last = scan(values, **settings)
    grads = torch.autograd.grad(y.square().mean() + last.sin().mean(), list(values.values()))
    return [y, last, *grads]


def close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * max(1e-3, b.abs().max().item())


# the selective scan


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ({}, {}),
        ({}, {"chunk_size": 8}),  # 37 is no multiple
        ({}, {"chunk_size": 1}),
        ({}, {"num_lanes": 4}),  # 10 steps each, the last lane padded
        ({}, {"num_lanes": 64}),  # more lanes than steps
        ({"length": 1}, {}),
        ({"length": 1}, {"num_lanes": 2}),
        ({"batch": 3, "channels": 5, "groups": 1, "states": 1}, {"chunk_size": 16}),
        ({"channels": 4, "groups": 4, "states": 1}, {"num_lanes": 3, "chunk_size": 5}),
    ],
)
def test_chunks_and_lanes_equal_the_sequential_scan(
    sizes: dict[str, int], settings: dict[str, int]
) -> None:
    values = arguments(**sizes)
    expected = loss_grads(values, implementation="reference")
    # float32 round-off over 37 steps: 1e-6 relative to the largest entry
    close(loss_grads(values, **settings), expected, 1e-5)


def test_the_reference_is_the_formula() -> None:
    """One channel, one number of state, two steps, by hand."""
    one = torch.ones(1, 1, 2)
    y, last = selective_scan(
        torch.tensor([[[2.0, 3.0]]]), one, torch.tensor([[-1.0]]), one, 2 * one,
        D=torch.tensor([10.0]), initial_state=torch.tensor([[[5.0]]]), implementation="reference",
    )  # fmt: skip
    decay = torch.exp(torch.tensor(-1.0))
    first = decay * 5 + 2
    second = decay * first + 3
    torch.testing.assert_close(y[0, 0], torch.stack((2 * first + 20, 2 * second + 30)))
    torch.testing.assert_close(last[0, 0, 0], second)


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_gradients_in_double_precision(num_lanes: int) -> None:
    values = arguments(1, 2, 7, 2, 1, dtype=torch.float64)

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(values, inputs, strict=True))
        return scan(named, chunk_size=3, num_lanes=num_lanes)

    assert torch.autograd.gradcheck(function, tuple(values.values()))


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    def operator_inputs() -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((5, 2, 2, 3), (5, 2, 2, 3), (2, 3, 2), (5, 2, 2, 2), (5, 2, 2, 2), (2, 2, 3, 2))
        tensors = [torch.rand(*shape, generator=generator).requires_grad_() for shape in shapes]
        return (*tensors, 2)

    torch.library.opcheck(torch.ops.genscale.selective_scan.default, operator_inputs())


def test_second_derivatives_are_refused_not_wrong() -> None:
    values = arguments()
    y, _ = scan(values)
    (grad,) = torch.autograd.grad(y.sum(), values["u"], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_a_sequence_in_pieces_equals_the_whole(implementation: str) -> None:
    values = arguments()
    whole, last = scan(values, implementation=implementation)
    state, parts = values["initial_state"], []
    for piece in (slice(0, 1), slice(1, 20), slice(20, 37)):
        cut = {n: v[..., piece] if n in ("u", "delta", "B", "C", "z") else v
               for n, v in values.items()}  # fmt: skip
        y, state = scan(cut | {"initial_state": state}, implementation=implementation)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=-1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_constant_and_ungrouped_vectors() -> None:
    values = arguments(channels=4, groups=1)
    expected, _ = scan(values)
    ungrouped = values | {"B": values["B"][:, 0], "C": values["C"][:, 0]}
    assert torch.equal(scan(ungrouped)[0], expected)

    constant = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    shared = constant[:1].expand(4, 3)  # the same vector in every channel: one group, written out
    written_out = constant[:1].T.expand(2, 1, 3, 37)
    torch.testing.assert_close(
        scan(values | {"B": shared})[0], scan(values | {"B": written_out})[0]
    )


def test_a_step_of_zero_keeps_the_state_and_a_long_one_forgets_it() -> None:
    values = {name: value.detach() for name, value in arguments(length=80).items()}
    del values["delta_bias"]
    still = values | {"delta": torch.zeros_like(values["delta"])}
    _, last = scan(still, delta_softplus=False)
    assert torch.equal(last, values["initial_state"])
    # exp(-50 x 16) underflows to zero: only the last input is left, and nothing is NaN
    jump = values | {
        "delta": torch.full_like(values["delta"], 50.0),
        "A": torch.full((6, 3), -16.0),
    }
    y, last = scan(jump, delta_softplus=False)
    expected = 50 * values["u"][..., -1:] * values["B"][..., -1].repeat_interleave(3, dim=1)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(last, expected)


def test_strided_inputs_give_the_same_numbers() -> None:
    values = arguments()
    expected, _ = scan(values)
    time_first = {
        name: value.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        for name, value in values.items()
        if name in ("u", "delta", "z")
    }
    torch.testing.assert_close(scan(values | time_first)[0], expected)  # vectorised otherwise


def test_half_precision_is_rounded_once_at_the_end() -> None:
    values = {
        name: value.detach().bfloat16() if value.dim() > 2 else value.detach()
        for name, value in arguments().items()
    }
    expected, last = scan({name: value.float() for name, value in values.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, last_half = scan(values)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())
    assert torch.equal(last_half, last)


def test_it_compiles_into_one_graph() -> None:
    values = arguments()
    torch._dynamo.reset()
    results = []
    for function in (scan, torch.compile(scan, fullgraph=True, backend="aot_eager")):
        y, _ = function(values)
        results.append([y, *torch.autograd.grad(y.square().sum(), [values["u"], values["A"]])])
    close(results[1], results[0], 1e-6)


def test_memory_does_not_hold_every_state() -> None:
    """The whole of the states would be N times the input; chunks keep N / 64 of it."""
    values = arguments(1, 64, 1024, 16, 1)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scan(values)
    assert max(kept) <= values["u"].numel()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"delta": torch.zeros(2, 6, 36)}, r"u and delta must both have shape"),
        ({"A": torch.zeros(5, 3)}, r"A must have shape \(6, N\) for 6 channels, but has \(5, 3\)"),
        ({"B": torch.zeros(2, 4, 3, 37)}, r"B must have shape \(2, G, 3, 37\) with G dividing 6"),
        ({"C": torch.zeros(2, 37, 3)}, r"C must have .* but has \(2, 37, 3\).* time comes last"),
        ({"initial_state": torch.zeros(2, 3, 6)}, r"initial_state must have shape \(2, 6, 3\)"),
        ({"chunk_size": 0}, "chunk_size and num_lanes must be 1 or more, but are 0 and None"),
        ({"implementation": "chunk"}, "must be one of .*, but is 'chunk'. Did you mean 'chunked'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        scan({**arguments(), **changes})


# the scan of Mamba-2


def ssd_arguments(length: int = 50, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    values = {
        "x": draw(2, length, 4, 5),
        "dt": draw(2, length, 4),
        "A": -draw(4).exp(),
        "B": draw(2, length, 2, 3),
        "C": draw(2, length, 2, 3),
        "D": draw(4),
        "z": draw(2, length, 4, 5),
        "dt_bias": draw(4),
        "initial_state": draw(2, 4, 5, 3),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 64])
@pytest.mark.parametrize("dt_limit", [None, (0.1, 1.5)])
def test_matrix_form_equals_the_sequential_scan(
    chunk_size: int | None, dt_limit: tuple[float, float] | None
) -> None:
    values, results = ssd_arguments(), []
    for settings in ({"implementation": "reference"}, {"chunk_size": chunk_size}):
        y, last = ssd(**values, **settings, dt_limit=dt_limit)  # type: ignore[arg-type]
        loss = y.square().mean() + last.sin().mean()
        results.append([y, last, *torch.autograd.grad(loss, list(values.values()))])
    close(results[1], results[0], 1e-5)


def test_matrix_form_gradients_in_double_precision() -> None:
    values = ssd_arguments(5, dtype=torch.float64)

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(**dict(zip(values, inputs, strict=True)), chunk_size=2)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(function, tuple(values.values()), fast_mode=True)


def test_matrix_form_survives_long_steps() -> None:
    values = ssd_arguments(200)
    values["dt"] = torch.full_like(values["dt"], 50.0).requires_grad_()
    y, _ = ssd(**values)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(y.square().mean(), values["dt"])
    assert torch.isfinite(y).all()
    assert torch.isfinite(grad).all()


def test_matrix_form_under_autocast_is_float32_inside() -> None:
    values = {name: value.detach() for name, value in ssd_arguments().items()}
    expected, _ = ssd(**values)  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssd(**values)[0], expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dt": torch.zeros(2, 50, 3)}, r"x, dt and A must have shapes"),
        ({"B": torch.zeros(2, 50, 3, 3)}, r"B and C must have shape \(2, 50, G, N\)"),
        ({"initial_state": torch.zeros(2, 4, 3, 5)}, r"initial_state must have .* \(2, 4, 5, 3\)"),
        ({"chunk_size": 0}, "chunk_size must be 1 or more, but is 0"),
        ({"implementation": "fast"}, "implementation must be 'chunked' or 'reference'"),
    ],
)
def test_ssd_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ssd(**{**ssd_arguments(), **changes})


# orders


@pytest.mark.parametrize("kind", SCAN_KINDS)
@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 6), (5, 2)])
def test_orders_visit_every_cell_once_and_inverses_undo_them(
    kind: Any, height: int, width: int
) -> None:
    orders, inverses = scan_orders(kind, height, width, CPU)
    cells = torch.arange(height * width)
    for order, inverse in zip(orders, inverses, strict=True):
        assert torch.equal(order.sort().values, cells)
        assert torch.equal(order[inverse], cells)
    first, second, third, fourth = orders
    backwards = ((first, second), (third, fourth)) if kind == "continuous" else (
        (first, third), (second, fourth))  # fmt: skip
    for forward, backward in backwards:
        assert torch.equal(forward.flip(0), backward)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (5, 2)])
def test_continuous_orders_step_to_neighbours(height: int, width: int) -> None:
    orders, _ = scan_orders("continuous", height, width, CPU)
    rows, columns = orders // width, orders % width
    assert bool((rows.diff().abs() + columns.diff().abs() == 1).all())
    # they start rightwards at the top left and, for columns, upwards at the bottom left
    assert orders[0, :2].tolist() == [0, 1]
    assert orders[2, :2].tolist() == [(height - 1) * width, (height - 2) * width]


def test_orders_are_made_once_and_usable_after_inference_mode() -> None:
    with torch.inference_mode():
        orders, inverses = scan_orders("cross", 7, 9, CPU)
    assert scan_orders("cross", 7, 9, CPU)[0] is orders
    x = torch.randn(63, 2, requires_grad=True, generator=torch.Generator().manual_seed(0))
    y = permute_rows(x, orders[1], inverses[1])
    assert torch.equal(y, x[orders[1]])
    weight = torch.arange(126.0).view(63, 2)
    (grad,) = torch.autograd.grad((y * weight).sum(), x)
    assert torch.equal(grad, weight[inverses[1]])


# modules


def test_a_scan_over_a_grid_depends_on_every_cell_and_keeps_its_shape() -> None:
    torch.manual_seed(0)
    module = SS2D(8, state_size=2)
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape
    (grad,) = torch.autograd.grad(y[0, 1, 2].sum(), x)
    assert bool((grad[0].abs().amax(-1) > 0).all())  # in all directions
    assert not grad[1].any()  # and not over the batch


def test_a_scan_over_a_grid_starts_as_published() -> None:
    torch.manual_seed(0)
    module = SS2D(32, state_size=3)
    assert torch.equal(module.log_rate[7].exp().round(), torch.tensor([1.0, 2.0, 3.0]))
    step = torch.nn.functional.softplus(initial_step_bias(4000))
    assert step.min() >= 1e-3 * 0.999
    assert step.max() <= 0.1 * 1.001
    assert step.log().mean().item() == pytest.approx(-4.605, abs=0.1)  # log 0.01, the middle
    assert bool((module.skip == 1).all())
    # E = 64 inputs, rank ceil(32 / 16) = 2
    assert module.select.abs().max().item() == pytest.approx(1 / 8, rel=0.02)
    assert module.step_weight.shape == (4, 64, 2)
    assert module.step_weight.abs().max().item() == pytest.approx(2**-0.5, rel=0.02)


def test_a_grid_scan_in_bfloat16_stays_close() -> None:
    torch.manual_seed(0)
    module, x = SS2D(16), torch.randn(1, 6, 6, 16)
    exact = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = module(x)
    # four layers in a row, each rounding at 2^-9
    assert (rounded.float() - exact).norm() / exact.norm() < 0.02


def test_mamba2_is_causal_and_its_state_follows_particles() -> None:
    torch.manual_seed(0)
    block = Mamba2(16, state_size=4, head_size=8, num_groups=2)
    x = torch.randn(3, 12, 16)
    whole, _ = block(x)
    changed = x.clone()
    changed[:, 8:] += 1
    torch.testing.assert_close(block(changed)[0][:, :8], whole[:, :8])
    assert not torch.allclose(block(changed)[0][:, 8:], whole[:, 8:])

    _, state = block(x[:, :7])
    assert isinstance(state, Mamba2State)
    index = torch.tensor([2, 0, 0])
    rest, _ = block(x[index, 7:], state.select(index))
    torch.testing.assert_close(rest, whole[index, 7:], rtol=1e-4, atol=1e-5)


def test_mamba2_refuses_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="32 must be a multiple of head_size 12"):
        Mamba2(16, head_size=12)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"num_lanes": 1}])
def test_a_gpu_gives_the_numbers_of_the_cpu(settings: dict[str, int]) -> None:
    values = arguments(length=300)
    expected = loss_grads(values, implementation="reference")
    moved = {name: v.detach().cuda().requires_grad_() for name, v in values.items()}
    close([value.cpu() for value in loss_grads(moved, **settings)], expected, 1e-4)


def test_the_recurrences_agree_on_their_own_layout() -> None:
    """Time first, groups apart: what ``selective_scan`` and every other caller stands on."""
    generator = torch.Generator().manual_seed(3)
    steps = [torch.rand(9, 2, 2, 3, generator=generator) for _ in range(2)]
    rates = -torch.rand(2, 3, 4, generator=generator)
    vectors = [torch.rand(9, 2, 2, 4, generator=generator) for _ in range(2)]
    values = (*steps, rates, *vectors, torch.rand(2, 2, 3, 4, generator=generator))
    y, last = recur_reference(*values)
    for got in (recur(*values, 4), recur_in_lanes(*values, 4, 2)):
        torch.testing.assert_close(got[0], y)
        torch.testing.assert_close(got[1], last)
