"""Time enlarging by two: latents before one decoding, against pictures behind it.

python scripts/bench_upscaling.py [--size small] [--sizes 64 128 256] [--repeats 5] [--device cpu]

From one latent of a picture, in every row to a picture of twice its side, with random weights:

* ``lua``: the latent enlarged, then decoded at the larger size; ``lua, tiles`` decodes in tiles;
* ``swinir``: decoded, then the picture enlarged by a network with the same trunk (``--pixel
  classical``: by SwinIR-M, 11.8 million weights);
* ``bicubic_latent`` and ``bicubic``: both without a network;
* ``native``: decoding a latent of the larger size, as a model of that size would.

``--size published`` takes the autoencoder and the LUA of FLUX; ``small`` takes an autoencoder of
the same eight pixels a cell, and SwinIR-light's trunk. On CUDA published sizes, bfloat16 and 512
and 1024 pixels are the default.

Seconds are medians of one picture; ``decode`` is the part of the decoder, ``upscale`` the rest.
On a CPU they are those of the processor, which other work on the machine does not lengthen.
Exits with 1 where, at the largest size, ``lua`` is below 2.5 times as fast as ``swinir``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.autoencoders.kl_network import KLNetwork
from genscale.upscaling.base import Upscaler
from genscale.upscaling.interpolation import Interpolation
from genscale.upscaling.lua import LUA
from genscale.upscaling.stage import Upscaling
from genscale.upscaling.swinir import SwinIR

LEAST_GAIN = 2.5
STRIDE = 8  # pixels a latent cell covers, in all autoencoders here

# size -> autoencoder, trunk of both networks, width of LUA's heads
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "small": (
        {"hidden_size": 32, "num_blocks": 1, "latent_channels": 4},
        {"window_size": 8, "depths": [6] * 4, "hidden_size": 60, "num_heads": [6] * 4},
        64,
    ),
    "published": (
        {"hidden_size": 128, "num_blocks": 2, "latent_channels": 16},
        {"window_size": 16, "depths": [6] * 6, "hidden_size": 360, "num_heads": [12] * 6},
        256,
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one way to a picture takes.

    Attributes:
        base: side of the picture before enlarging.
        target: side of the picture that comes out.
        method: see the head of this file.
        upscale: seconds outside the decoder.
        decode: seconds of the decoder.
        total: seconds.
        gigabytes: of memory at the peak, on CUDA; 0 elsewhere.
    """

    base: int
    target: int
    method: str
    upscale: float
    decode: float
    total: float
    gigabytes: float


def networks(size: str, pixel: str) -> tuple[KLNetwork, LUA, SwinIR]:
    """Return an autoencoder, an upscaler of its latents, and one of its pictures."""
    autoencoder, trunk, width = SIZES[size]
    torch.manual_seed(0)
    vae = KLNetwork(**autoencoder)
    channels = vae.latent_channels
    lua: LUA = LUA(channels=channels, scales=(2,), head_size=width, input_size=64, **trunk)
    swinir: SwinIR = SwinIR(input_size=64, **(trunk if pixel == "equal" else {}))
    return vae, lua, swinir


class Decoder:
    """A decoder that is timed whenever it is called.

    Args:
        vae: what decodes.
        clock: seconds, with the work on the device done.
    """

    def __init__(self, vae: KLNetwork, clock: Callable[[], float]) -> None:
        self.vae, self.clock, self.seconds = vae, clock, 0.0

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents, and take the time."""
        start = self.clock()
        images = self.vae.decode(latents)
        self.seconds += self.clock() - start
        return images


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock: of the processor on a CPU, else of the wall once the device is done."""
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def ways(vae: KLNetwork, lua: LUA, swinir: SwinIR, base: int) -> dict[str, Upscaling | None]:
    """Return every way to a picture; None decodes a latent of its size."""

    def plain(space: str, channels: int) -> Upscaler:
        network: Upscaler = Interpolation(space=space, channels=channels)
        return network

    tile = max(base // STRIDE, 8)  # half a side: three tiles, as they overlap
    return {
        "native": None,
        "bicubic_latent": Upscaling(plain("latent", vae.latent_channels)),
        "lua": Upscaling(lua, scale=2),
        "lua, tiles": Upscaling(lua, scale=2, decode_tile=tile),
        "bicubic": Upscaling(plain("pixel", 3)),
        "swinir": Upscaling(swinir, scale=2),
    }


@torch.no_grad()
def measure(
    method: str,
    way: Upscaling | None,
    vae: KLNetwork,
    base: int,
    *,
    device: torch.device,
    arithmetic: Callable[[], AbstractContextManager[Any]],
    repeats: int,
    warm_up: int,
) -> Row:
    """Time one way to one picture."""
    side = (base if way is not None else 2 * base) // STRIDE
    latents = torch.randn(1, vae.latent_channels, side, side).to(device)
    decoder = Decoder(vae, clock_of(device))
    totals, decodes = [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for turn in range(warm_up + repeats):
        decoder.seconds = 0.0
        start = decoder.clock()
        with arithmetic():
            images = decoder(latents) if way is None else way.decode(vae, decoder, latents)
        total = decoder.clock() - start
        if images.shape != (1, 3, 2 * base, 2 * base):
            raise RuntimeError(f"{method} made {tuple(images.shape)} of {base} pixels")
        if turn >= warm_up:
            totals.append(total)
            decodes.append(decoder.seconds)
    total, decode = statistics.median(totals), statistics.median(decodes)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    return Row(base, 2 * base, method, total - decode, decode, total, peak)


def rows(arguments: argparse.Namespace, size: str, sides: list[int], dtype: str) -> Iterator[Row]:
    """Yield a row for every side and way; the slowest come last."""
    device: torch.device = arguments.device
    parts = networks(size, arguments.pixel)
    for part in parts:
        nn.Module.to(part, device).eval().requires_grad_(False)
    vae, lua, swinir = parts

    def arithmetic() -> AbstractContextManager[Any]:
        if dtype == "float32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    print(f"{size}: autoencoder {_millions(vae)}, lua {_millions(lua)}, swinir {_millions(swinir)}")
    for base in sides:
        for method, way in ways(vae, lua, swinir, base).items():
            yield measure(
                method,
                way,
                vae,
                base,
                device=device,
                arithmetic=arithmetic,
                repeats=arguments.repeats or (20 if device.type == "cuda" else 5),
                warm_up=20 if device.type == "cuda" else 1,
            )


def _millions(network: nn.Module) -> str:
    return f"{sum(weight.numel() for weight in network.parameters()) / 1e6:.2f} million weights"


def main() -> int:
    """Print the table; return 1 where latents are not enlarged fast enough."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), help="default: published on CUDA")
    parser.add_argument("--pixel", choices=["equal", "classical"], default="equal")
    parser.add_argument("--sizes", type=int, nargs="+", help="sides before enlarging, in pixels")
    parser.add_argument("--repeats", type=int, help="default: 20 on CUDA, else 5")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA"
    )
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    device: torch.device = arguments.device
    fast = device.type == "cuda"
    size = arguments.size or ("published" if fast else "small")
    dtype = arguments.dtype or ("bfloat16" if fast else "float32")
    sides = sorted(arguments.sizes or ([512, 1024] if fast else [64, 128, 256]))
    where = torch.cuda.get_device_name(device) if fast else f"{torch.get_num_threads()} threads"
    print(f"{where}, {dtype}, batch 1; seconds{'' if fast else ' of the processor'}")
    print(
        f"{'from':>6}{'to':>6}  {'method':<16}{'upscale':>10}{'decode':>10}{'total':>10}{'GB':>7}"
    )
    found: list[Row] = []
    for row in rows(arguments, size, sides, dtype):
        found.append(row)
        print(
            f"{row.base:>6}{row.target:>6}  {row.method:<16}{row.upscale:>10.4f}{row.decode:>10.4f}"
            f"{row.total:>10.4f}{row.gigabytes:>7.2f}",
            flush=True,
        )
    totals = {(row.base, row.method): row.total for row in found}
    gains = {base: totals[base, "swinir"] / totals[base, "lua"] for base in sides}
    for base, gain in gains.items():
        print(f"{base} -> {2 * base}: lua is {gain:.2f} times as fast as swinir")
    if arguments.json:
        header = {"where": where, "size": size, "pixel": arguments.pixel, "dtype": dtype}
        record = {**header, "gains": gains, "rows": [asdict(row) for row in found]}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return int(gains[sides[-1]] < LEAST_GAIN)


if __name__ == "__main__":
    sys.exit(main())
