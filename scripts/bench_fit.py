"""Compare FIT, the network of Snap Video, with spatio-temporal U-Nets: time, memory, operations.

python scripts/bench_fit.py [--size small] [--device cuda --dtype bfloat16 --compile] [--json FILE]

The U-Nets are diffusers': ``UNet3DConditionModel`` (convolutions and attention along time after
those of each frame) and ``UNetSpatioTemporalConditionModel`` (the same, mixed in by learned
weights). Their widths and blocks are searched so that they agree within 5 % with FIT in

    operations of a forward pass (matrix products, convolutions, attention),
    parameters in the proportion of the paper, 284 to 497 million,
    parameters.

Of the families in FAMILIES the first that has a member this close is taken; attention is on all
levels but the first, as in the paper. Every U-Net takes turns with FIT on the same input: a forward
pass, then a training step (forward, backward, AdamW). FIT is handed the latents of a former pass in
both; the pass without gradients that makes them in training is timed apart. Numbers are medians of
the turns; on one thread of a CPU they are processor time, which other programs disturb less.
Peak memory is all that a network needs: weights, optimizer, gradients, activations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.backbones.base import parameter_count
from genscale.backbones.fit import FIT
from genscale.conditioning.base import Conditioning
from genscale.flops import count_flops
from scripts.bench_backbones import clock, finish
from scripts.bench_dimr import peak_bytes, precision
from scripts.bench_fit_unets import (
    KINDS,
    SIZES,
    Choice,
    Inputs,
    Size,
    call_unet,
    cost,
    search,
    unet,
)

PAPER = {"inference": 105.1 / 23.4, "training": 230.3 / 69.5}  # U-Net 284M over FIT 500M, ms a clip
TARGETS = {  # name -> what is compared with FIT's, and in which proportion
    "equal FLOPs": ("flops", 1.0),
    "paper's proportion": ("parameters", 284 / 497.35),
    "equal parameters": ("parameters", 1.0),
}


def fit(size: Size) -> FIT:
    """Build the FIT of a size."""
    count, width = size.text
    network: FIT = FIT(
        input_size=size.clip,
        text_size=width,
        num_text_tokens=count,
        reads_frame_rate=True,
        **size.fit,
    )
    return network


def call_fit(
    network: nn.Module, inputs: Inputs, memory: dict[str, Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Predict ``(B, C, T, H, W)`` and the latents for the next call."""
    batch = len(inputs.x)
    cond = Conditioning(
        labels=torch.zeros(batch, dtype=torch.int64, device=inputs.x.device),
        text=inputs.text,
        frame_rate=inputs.frame_rate,
    )
    output = network(inputs.x, inputs.t, cond, memory)
    return output.sample, output.memory


# ---------------------------------------------------------------------------------------- timing


@dataclass
class Network:
    """A network as it is run: plain or compiled, with its optimizer and its inputs."""

    name: str
    module: nn.Module
    forward: Callable[[], Tensor]
    setup: Setup
    parameters: int
    flops: int
    optimizer: torch.optim.Optimizer

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights, buffers and what the optimizer holds."""
        held = [*self.module.parameters(), *self.module.buffers()]
        held += [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))

    def infer(self) -> None:
        """Run a forward pass as in sampling."""
        self.module.eval()
        with precision(self.setup.device, self.setup.dtype), torch.no_grad():
            self.forward()
        finish(self.setup.device)

    def train(self) -> None:
        """Run a training step."""
        self.module.train()
        with precision(self.setup.device, self.setup.dtype):
            sample = self.forward()
        torch.autograd.backward(sample.float().square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()
        finish(self.setup.device)


@dataclass(frozen=True)
class Setup:
    """How all are run."""

    size_name: str
    device: torch.device
    dtype: str
    batch: int
    repeats: int
    warmup: int
    compiled: bool
    channels_last: bool
    targets: tuple[str, ...] = tuple(TARGETS)

    def compile(self, module: nn.Module) -> Any:
        """Return what is called in the place of a network."""
        return torch.compile(module) if self.compiled else module

    def network(
        self, name: str, module: nn.Module, call: Callable[[nn.Module], Tensor], flops: int
    ) -> Network:
        """Move a network to the device and compile it."""
        module = nn.Module.to(module, self.device)
        if self.channels_last:
            for child in module.modules():
                if isinstance(child, nn.Conv2d):
                    data = child.weight.data
                    child.weight.data = data.contiguous(memory_format=torch.channels_last)
        forward = partial(call, self.compile(module))
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        return Network(name, module, forward, self, parameter_count(module), flops, optimizer)


def in_turns(works: Mapping[str, Callable[[], None]], setup: Setup) -> dict[str, float]:
    """Return each one's median of seconds a clip, of repetitions that take turns."""
    now = clock(setup.device)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(setup.warmup + setup.repeats):
        for name, work in works.items():
            start = now()
            work()
            if turn >= setup.warmup:
                seconds[name].append((now() - start) / setup.batch)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peaks(network: Network) -> dict[str, int]:
    """Return peak bytes of inference and training; both are warm after it."""
    result = {"inference": peak_bytes(network.infer, network.setup.device)}
    result["inference"] += network.resident_bytes  # the optimizer holds nothing yet
    network.train()
    result["training"] = peak_bytes(network.train, network.setup.device) + network.resident_bytes
    return result


def build_fit(setup: Setup, flops: int) -> tuple[Network, Callable[[], None]]:
    """Return FIT, and the pass of training that makes the latents it is handed."""
    size = SIZES[setup.size_name]
    inputs = Inputs.of(size, setup.batch, setup.device)
    torch.manual_seed(0)
    module = fit(size)
    memory = {
        "latents": torch.randn(setup.batch, *module.latents.shape, device=setup.device),
        "known": torch.ones(setup.batch, dtype=torch.bool, device=setup.device),
    }
    network = setup.network("FIT", module, lambda net: call_fit(net, inputs, memory)[0], flops)
    again = setup.compile(module)

    def first_pass() -> None:
        module.train()
        with precision(setup.device, setup.dtype), torch.no_grad():
            call_fit(again, inputs, None)
        finish(setup.device)

    return network, first_pass


def build_unet(choice: Choice, setup: Setup) -> Network:
    """Return a U-Net that is ready to run."""
    size = SIZES[setup.size_name]
    inputs = Inputs.of(size, setup.batch, setup.device)
    torch.manual_seed(0)
    module = unet(choice.kind, choice.widths, choice.layers, size)
    flops = cost(choice.kind, choice.widths, choice.layers, setup.size_name, "flops")
    call = partial(call_unet, kind=choice.kind, inputs=inputs)
    return setup.network(choice.kind, module, call, flops)


# ---------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Row:
    """A line of the table; seconds are a clip's, ratios over FIT's in the same turns."""

    target: str
    network: str
    widths: tuple[int, ...]
    layers: int
    parameters: int
    flops: int
    seconds: dict[str, float]
    fit_seconds: dict[str, float]
    peak_bytes: dict[str, int]

    @property
    def ratio(self) -> dict[str, float]:
        """Time over FIT's, the training step without and with FIT's pass that makes latents."""
        result = {key: self.seconds[key] / self.fit_seconds[key] for key in PAPER}
        both = self.fit_seconds["training"] + self.fit_seconds["first pass"]
        return {**result, "training, both passes": self.seconds["training"] / both}


def measure(setup: Setup) -> tuple[Row, list[Row]]:
    """Return FIT's row, with medians over all turns, and the U-Nets' rows; prints as it goes."""
    size = SIZES[setup.size_name]
    with torch.device("meta"):
        twin = fit(size)
    aims = {"parameters": parameter_count(twin), "flops": count_flops(twin, (3, *size.clip))}
    choices = [
        (target, search(kind, setup.size_name, quantity, part * aims[quantity]))
        for target, (quantity, part) in TARGETS.items()
        if target in setup.targets
        for kind in KINDS
    ]
    ours, first_pass = build_fit(setup, aims["flops"])
    our_peaks = peaks(ours)
    rows = []
    for target, choice in choices:
        theirs = build_unet(choice, setup)
        their_peaks = peaks(theirs)
        infer = in_turns({"fit": ours.infer, "unet": theirs.infer}, setup)
        train = in_turns({"fit": ours.train, "first pass": first_pass, "unet": theirs.train}, setup)
        row = Row(
            target,
            theirs.name,
            choice.widths,
            choice.layers,
            theirs.parameters,
            theirs.flops,
            {"inference": infer["unet"], "training": train["unet"]},
            {
                "inference": infer["fit"],
                "training": train["fit"],
                "first pass": train["first pass"],
            },
            their_peaks,
        )
        print(line(row), flush=True)
        rows.append(row)
        del theirs
    middle = {
        key: statistics.median(row.fit_seconds[key] for row in rows) for key in rows[0].fit_seconds
    }
    settings = (ours.parameters, ours.flops, middle, middle, our_peaks)
    return Row("", "FIT", (), 0, *settings), rows


HEADER = (
    f"{'':<46}{'param':>8}{'GFLOP':>8}{'forward':>10}{'GFLOP':>7}{'peak':>7}"
    f"{'training':>10}{'GFLOP':>7}{'peak':>7}{'U-Net / FIT':>24}\n"
    f"{'':<46}{'M':>8}{'':>8}{'ms':>10}{'/s':>7}{'MB':>7}{'ms':>10}{'/s':>7}{'MB':>7}"
    f"{'forward':>9}{'train':>7}{'(both)':>8}"
)


def line(row: Row) -> str:
    """Return a row as it is printed; a training step counts as three forward passes."""
    shape = f"{'-'.join(map(str, row.widths))} x {row.layers}" if row.widths else ""
    kind = row.network.replace("UNetSpatioTemporal", "UNetST")
    text = f"{row.target:<19}{kind:<8}{shape:<19}"
    text += f"{row.parameters / 1e6:>8.2f}{row.flops / 1e9:>8.1f}"
    for key, passes, width in (("inference", 1, 10), ("training", 3, 10)):
        seconds = row.seconds[key]
        text += f"{seconds * 1e3:>{width}.1f}{passes * row.flops / seconds / 1e9:>7.0f}"
        text += f"{row.peak_bytes[key] / 1e6:>7.0f}"
    if row.widths:
        ratio = row.ratio
        text += f"{ratio['inference']:>9.2f}{ratio['training']:>7.2f}"
        text += f"{ratio['training, both passes']:>8.2f}"
    return text


def closing(ours: Row, setup: Setup) -> Iterator[str]:
    """Yield what is printed below the table."""
    seconds = ours.seconds
    share = seconds["first pass"] / seconds["training"]
    yield line(ours)
    yield (
        f"FIT's pass without gradients, before a training step: {seconds['first pass'] * 1e3:.1f} "
        f"ms, {share:.0%} of the step; the last column counts it."
    )
    yield (
        f"Paper (arXiv:2402.14797, A100): {PAPER['inference']:.2f} forward, "
        f"{PAPER['training']:.2f} training, of FIT 500M and an ADM U-Net of 284M."
    )
    yield (
        "What differs: the paper's U-Net is ADM's with attention along time, these are diffusers'; "
        f"{setup.device} and batch {setup.batch} here, its batches are not told; AdamW for both "
        "here, LAMB for FIT there; whether its training time holds the pass without gradients is "
        "not told" + (";" if setup.size_name != "500m" else ".")
    )
    if setup.size_name != "500m":
        yield "sizes, too: --size 500m --device cuda has the published FIT."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--targets", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, help="clips; default: 1 on a CPU, 8 on a GPU")
    parser.add_argument("--repeats", type=int, help="default: 3 on a CPU, 50 on a GPU")
    parser.add_argument("--compile", action="store_true", help="compile all networks")
    parser.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="memory format of the U-Nets' convolutions of frames",
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    on_cpu = options.device.type == "cpu"
    setup = Setup(
        options.size,
        options.device,
        options.dtype,
        options.batch or (1 if on_cpu else 8),
        options.repeats or (3 if on_cpu else 50),
        0 if on_cpu else 20,  # that of memory warms up, too
        options.compile,
        options.channels_last,
        tuple(options.targets),
    )
    clip = " x ".join(map(str, SIZES[setup.size_name].clip))
    print(
        f"clips of {clip}, batch {setup.batch}, {setup.device}, {setup.dtype}, "
        f"{torch.get_num_threads()} threads, {'compiled' if setup.compiled else 'not compiled'}, "
        f"medians of {setup.repeats}; ms a clip"
    )
    print(HEADER, flush=True)
    ours, rows = measure(setup)
    print("\n".join(closing(ours, setup)))
    if options.json:
        numbers = {
            **{key: str(value) for key, value in asdict(setup).items()},
            "paper": PAPER,
            "fit": asdict(ours),
            "unets": [{**asdict(row), "ratio": row.ratio} for row in rows],
        }
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
