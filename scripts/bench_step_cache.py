"""Compare step caching with whole evaluations: seconds, evaluations, and how far samples move.

python scripts/bench_step_cache.py [--run FOLDER] [--model dit] [--device cuda] [--json FILE]

With ``--run`` the trained network of a run samples in its own way; distances then tell what caching
costs. Without it, a network with random weights does, of published size on a GPU and a slim one on
a CPU: its seconds are those of any weights of that size, its distances say nothing of trained
ones. Distances are root mean squares over all samples, divided by that of the uncached samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale import rng
from genscale.backbones.base import Backbone
from genscale.backbones.dimr import DiMR
from genscale.backbones.dit import DiT
from genscale.backbones.lamamba import LaMamba
from genscale.backbones.uvit import UViT
from genscale.conditioning.base import Conditioning
from genscale.guidance.base import Guidance, Unguided
from genscale.guidance.cfg import ClassifierFree
from genscale.objectives.base import Denoiser
from genscale.objectives.flow import FlowMatching
from genscale.pipeline import GenerationPipeline
from genscale.samplers.grid import GridSampler
from genscale.samplers.ode import Euler
from genscale.samplers.step_cache import FORA, NoStepCache, StepCache, Taylor

MODELS: dict[str, Callable[..., Backbone]] = {
    "dit": DiT,
    "uvit": UViT,
    "dimr": DiMR,
    "lamamba": LaMamba,
}
SLIM: dict[str, dict[str, Any]] = {
    "dit": {"hidden_size": 192, "depth": 6, "num_heads": 3},
    "uvit": {"hidden_size": 192, "depth": 7, "num_heads": 3},
    "dimr": {"hidden_sizes": [192, 96], "depths": [7, 3], "num_heads": 3},
    "lamamba": {"hidden_sizes": [32, 64, 128, 128], "depths": [1, 1, 1, 1], "num_heads": 4},
}


@dataclass(frozen=True)
class Measurement:
    """What a kind of caching took and gave."""

    cache: str
    seconds: float
    evaluations: float
    distance: float
    bytes: int


def caches(intervals: list[int]) -> list[StepCache]:
    """Return no caching, and every kind of it at every interval."""
    kinds: list[StepCache] = [NoStepCache()]
    for interval in intervals:
        kinds += [
            FORA(interval),
            Taylor(interval, order=1),
            Taylor(interval, order=2),
            Taylor(interval, order=2, basis="newton"),
        ]
    return kinds


def random_network(name: str, device: torch.device) -> Backbone:
    """Return a network whose weights are random everywhere, also where fresh ones are zero."""
    torch.manual_seed(0)
    with torch.device(device):
        backbone = MODELS[name](**({} if device.type == "cuda" else SLIM[name])).eval()
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return backbone


def precision(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Return autocast for half-precision types, nothing for float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def measure(
    kind: StepCache,
    view: Denoiser,
    sampler: GridSampler,
    guidance: Guidance,
    cond: Conditioning,
    seeds: Tensor,
    exact: Tensor | None,
) -> tuple[Measurement, Tensor]:
    """Sample once with one kind of caching; return what it took, and the samples."""
    cached = guidance.wrap(kind.wrap(view, sampler.last_level(view.process)))
    cuda = view.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(view.device)
        torch.cuda.synchronize(view.device)
    start = time.perf_counter()
    state = sampler.run(cached, cond, seeds)
    if cuda:
        torch.cuda.synchronize(view.device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(view.device) if cuda else 0
    exact = state.x if exact is None else exact
    distance = float((state.x - exact).double().square().mean().sqrt())
    scale = float(exact.double().square().mean().sqrt())
    return Measurement(
        kind.label, seconds, float(state.nfe.mean()), distance / scale, peak
    ), state.x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", help="a run or an exported folder")
    parser.add_argument("--model", choices=list(MODELS), default="dit", help="without --run")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--batch", type=int, help="default: 4 on a CPU, 32 on a GPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, help="of Euler; default: a run's own sampler, else 50")
    parser.add_argument("--scale", type=float, default=1.0, help="of classifier-free guidance")
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    device: torch.device = arguments.device
    batch = arguments.batch or (4 if device.type == "cpu" else 32)

    sampler: Any = Euler(arguments.steps or 50)
    guidance: Guidance = Unguided()
    if arguments.run:
        pipeline = GenerationPipeline.load(arguments.run, device=device)
        view = pipeline.objective.view(pipeline.model)
        guidance = pipeline.ready(pipeline.guidance)
        sampler = sampler if arguments.steps else pipeline.sampler
        classes = max(pipeline.num_classes, 1)
        name = str(arguments.run)
    else:
        view = FlowMatching().view(random_network(arguments.model, device))
        classes, name = 1000, arguments.model
    if arguments.scale != 1.0:
        guidance = ClassifierFree(arguments.scale)
    cond = Conditioning(labels=(torch.arange(batch) % classes).to(device))
    seeds = rng.sample_seeds(0, 0, batch)

    print(f"{name}, {device}, batch {batch}, {arguments.dtype}, {type(sampler).__name__}", end="")
    print(f" of {sampler.num_steps} steps, {torch.get_num_threads()} threads")
    print(f"{'step cache':<42}{'s':>9}{'speed':>8}{'nfe':>8}{'distance':>11}{'GB':>7}")
    found: list[Measurement] = []
    exact: Tensor | None = None
    with torch.no_grad(), precision(device, arguments.dtype):
        # once to warm up: kernels are chosen, operations counted
        measure(FORA(2), view, sampler, guidance, cond, seeds, None)
        for kind in caches(arguments.intervals):
            each, samples = measure(kind, view, sampler, guidance, cond, seeds, exact)
            exact = samples if exact is None else exact
            found.append(each)
            print(
                f"{each.cache:<42}{each.seconds:>9.3f}{found[0].seconds / each.seconds:>8.2f}"
                f"{each.evaluations:>8.2f}{each.distance:>11.2e}{each.bytes / 1e9:>7.2f}",
                flush=True,
            )
    if arguments.json:
        header = {"network": name, "device": str(device), "batch": batch, "dtype": arguments.dtype}
        results = [asdict(each) for each in found]
        arguments.json.write_text(json.dumps({**header, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
