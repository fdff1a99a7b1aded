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
import functools
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

PAPER = {"inference": 105.1 / 23.4, "training": 230.3 / 69.5}  # U-Net 284M over FIT 500M, ms a clip
CLOSE = 0.05
KINDS = ("UNet3D", "UNetSpatioTemporal")
TARGETS = {  # name -> what is compared with FIT's, and in which proportion
    "equal FLOPs": ("flops", 1.0),
    "paper's proportion": ("parameters", 284 / 497.35),
    "equal parameters": ("parameters", 1.0),
}
FAMILIES = [  # width of a level over that of the first, blocks a level; the paper's come first
    (multipliers, layers)
    for layers in (2, 1, 3)
    for multipliers in ((1, 2, 3, 4), (1, 2, 2, 4), (1, 2, 4, 4), (1, 3, 4, 6), (1, 1, 2, 3))
]
STEP = 32  # widths are multiples of the number of channels of a norm's groups
LARGEST = 512  # width of the first level


@dataclass(frozen=True)
class Size:
    """A clip, the FIT for it, and how finely widths of U-Nets may be chosen.

    Args:
        clip: frames, height, width.
        fit: settings of FIT beside the clip's and the text's.
        text: number and width of the text tokens.
        head: size of the U-Nets' heads; UNet3D begins with eight of them on all pixels, which small
            ones make thin.
    """

    clip: tuple[int, int, int]
    fit: Mapping[str, Any]
    text: tuple[int, int]
    head: int


NARROW = {"patch_width": 192, "context_width": 192, "latent_width": 256}  # 1/4 of the published
SIZES = {
    "tiny": Size(
        (2, 16, 16),
        {**NARROW, "group_size": (2, 2, 2), "num_latents": 64, "depth": 1, "global_depth": 1},
        (4, 32),
        8,
    ),
    "small": Size(
        (8, 32, 32), {**NARROW, "group_size": (8, 4, 4), "num_latents": 128}, (32, 192), 8
    ),
    "500m": Size((16, 40, 64), {}, (125, 1024), 32),
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


def unet(kind: str, widths: tuple[int, ...], layers: int, size: Size) -> nn.Module:
    """Build a U-Net with attention on all levels but the first."""
    from diffusers.models import unets

    spatio_temporal = kind == "UNetSpatioTemporal"
    suffix, deep = ("SpatioTemporal" if spatio_temporal else "3D"), len(widths) - 1
    shared = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "cross_attention_dim": size.text[1],
        "down_block_types": (f"DownBlock{suffix}", *[f"CrossAttnDownBlock{suffix}"] * deep),
        "up_block_types": (*[f"CrossAttnUpBlock{suffix}"] * deep, f"UpBlock{suffix}"),
    }
    classes: Any = unets  # whose constructors have no types
    network: nn.Module
    if spatio_temporal:
        network = classes.UNetSpatioTemporalConditionModel(
            **shared,
            num_attention_heads=tuple(width // size.head for width in widths),
            addition_time_embed_dim=64,
            projection_class_embeddings_input_dim=64,
            num_frames=size.clip[0],
        )
    else:  # what it calls the head's size is that indeed in its blocks
        network = classes.UNet3DConditionModel(**shared, attention_head_dim=size.head)
    return network


@dataclass(frozen=True)
class Inputs:
    """A clip ``(B, C, T, H, W)``, its time ``(B,)`` and its condition, the same for everybody."""

    x: Tensor
    t: Tensor
    text: Tensor
    frame_rate: Tensor

    @classmethod
    def of(cls, size: Size, batch: int, device: torch.device | str) -> Inputs:
        """Draw them."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, 3, *size.clip, generator=generator).to(device)
        text = torch.randn(batch, *size.text, generator=generator).to(device)
        return cls(x, torch.zeros(batch, device=device), text, torch.ones(batch, device=device))


def call_unet(network: nn.Module, kind: str, inputs: Inputs) -> Tensor:
    """Predict ``(B, C, T, H, W)``."""
    sample: Tensor
    if kind == "UNet3D":
        sample = network(inputs.x, inputs.t, inputs.text).sample
        return sample
    clip, rate = inputs.x.transpose(1, 2), inputs.frame_rate[:, None]
    sample = network(clip, inputs.t, inputs.text, rate).sample
    return sample.transpose(1, 2)


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


# ---------------------------------------------------------------------------------------- search


@functools.cache
def _sites(kind: str, layers: int, levels: int, size_name: str) -> dict[str, tuple[int, int]]:
    """Return, of one clip, how often each layer is applied, and how many rows a sequence has.

    Neither depends on widths, so that one pass on the meta device serves all of a family. Widths
    grow at every level here, so that all layers are there that a narrower one may lack.
    """
    size = SIZES[size_name]
    found: dict[str, tuple[int, int]] = {}

    def note(name: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
        found[name] = (
            output.numel() // weights[name].shape[0],
            output.shape[1] if output.dim() == 3 else 1,
        )

    network = _sketch(kind, tuple(STEP * (i + 1) for i in range(levels)), layers, size).eval()
    weights = _weights(network)
    for name in weights:
        network.get_submodule(name).register_forward_hook(partial(note, name))
    with torch.no_grad():
        call_unet(network, kind, Inputs.of(size, 1, "meta"))
    return found


def _sketch(kind: str, widths: tuple[int, ...], layers: int, size: Size) -> nn.Module:
    """Return a U-Net without numbers; the mixing weights of one kind ignore the device's mode."""
    with torch.device("meta"):
        return unet(kind, widths, layers, size).to("meta")


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are multiplied, by name of their layer."""
    return {
        name: module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    }


@functools.cache
def cost(kind: str, widths: tuple[int, ...], layers: int, size_name: str, quantity: str) -> int:
    """Return ``parameters`` or a clip's forward ``flops`` of a U-Net that is never run.

    A layer makes 2 FLOPs for each of its weights wherever it is applied; attention makes 4 for each
    channel, query and key. torch's counter says the same of a pass on the meta device, slower;
    it does not see the attention kernel of CPUs.
    """
    network = _sketch(kind, widths, layers, SIZES[size_name])
    if quantity == "parameters":
        return parameter_count(network)
    sites, flops = _sites(kind, layers, len(widths), size_name), 0
    for name, weight in _weights(network).items():
        flops += 2 * weight.numel() * sites[name][0]
        if name.endswith(".to_q"):
            keys = sites[name.removesuffix("to_q") + "to_k"][1]
            flops += 4 * sites[name][0] * keys * weight.shape[0]
    return flops


@dataclass(frozen=True)
class Choice:
    """A U-Net: its kind, widths of the levels, blocks a level."""

    kind: str
    widths: tuple[int, ...]
    layers: int


def ladder(multipliers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return all widths in these proportions, rounded to multiples of STEP, ascending."""
    rungs = (
        tuple(max(STEP, STEP * round(first * times / STEP)) for times in multipliers)
        for first in range(2, LARGEST, 2)
    )
    return list(dict.fromkeys(rungs))


def _squares(widths: tuple[int, ...]) -> float:
    return float(sum(width**2 for width in widths))


def search(kind: str, size_name: str, quantity: str, aim: float) -> Choice:
    """Return the first U-Net of FAMILIES whose ``quantity`` is within CLOSE of ``aim``.

    Raises:
        SystemExit: there is none.
    """
    best, best_miss = None, float("inf")
    for multipliers, layers in FAMILIES:
        rungs = ladder(multipliers)
        tried: dict[tuple[int, ...], float] = {}
        widths = rungs[len(rungs) // 8]
        while widths not in tried:  # cost is nearly proportional to the sum of squares
            tried[widths] = cost(kind, widths, layers, size_name, quantity) / aim
            wanted = _squares(widths) / tried[widths]
            widths = min(rungs, key=lambda rung: abs(_squares(rung) / wanted - 1))
        closest = min(tried, key=lambda rung: abs(tried[rung] - 1))
        if abs(tried[closest] - 1) < best_miss:
            best, best_miss = Choice(kind, closest, layers), abs(tried[closest] - 1)
        if best is not None and best_miss <= CLOSE:
            return best
    raise SystemExit(
        f"No {kind} has {quantity} within {CLOSE:.0%} of {aim:.3g}; the closest is {best}, "
        f"{best_miss:.0%} away. Take another --size."
    )


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
