"""What a search costs beyond its network, decoder and reward, and how its memory grows.

python scripts/bench_search.py [--particles 64] [--device cuda] [--json FILE]

Overhead: every search moves 64 particles of one prompt; its wall time less that of the network,
the decoder and the reward, as a share of the wall time. Networks have random weights: costs are
those of any weights of that size, rewards say nothing.
Memory: peak of a best-of-N run over that of a run of half the particles, and of half the
micro-batch, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.autoencoders.msvq import MSVQ
from genscale.backbones.base import Backbone
from genscale.backbones.dit import DiT
from genscale.backbones.var import VAR
from genscale.conditioning.base import Conditioning
from genscale.objectives.flow import FlowMatching
from genscale.objectives.next_scale import NextScale as NextScaleObjective
from genscale.rewards.base import Reward, RewardOutput
from genscale.samplers.base import Sampler
from genscale.samplers.next_scale import NextScale
from genscale.samplers.sde import DDIM
from genscale.search.base import Search
from genscale.search.best_of_n import BestOfN
from genscale.search.engine import Engine
from genscale.search.epsilon_greedy import EpsilonGreedy
from genscale.search.particles import FeynmanKac
from genscale.search.scorer import Scorer
from genscale.search.setup import work_of
from genscale.search.svdd import SVDD
from genscale.search.tts_var import TTSVAR
from genscale.search.zero_order import ZeroOrder

SCALES = [1, 2, 3, 4, 5, 6, 8]


class Contrast(Reward):
    """The standard deviation of a picture: as cheap as a reward can be, so overhead shows."""

    differentiable = True

    def score(self, images: Tensor, handle: Any, index: Tensor) -> RewardOutput:
        """Judge pictures."""
        return RewardOutput(images.flatten(1).std(1))


@dataclass(frozen=True)
class Overhead:
    """What one search took."""

    family: str
    search: str
    seconds: float
    network: float
    decode: float
    reward: float
    state_bytes: float
    nfe: float

    @property
    def share(self) -> float:
        """Of the wall time, what is neither network nor decoder nor reward."""
        return 1.0 - (self.network + self.decode + self.reward) / self.seconds


def diffusion(device: torch.device) -> tuple[Any, Backbone, Sampler, Callable[[Tensor], Tensor]]:
    """Return a DiT of 64 tokens, ten stochastic steps, and a decoder by enlargement."""
    model = DiT(
        input_size=16, in_channels=4, patch_size=2, hidden_size=384, depth=8, num_heads=6,
        num_classes=10,
    ).to(device)  # fmt: skip
    view = FlowMatching().view(model.eval())
    return view, model, DDIM(10, eta=1.0), lambda x: x[:, :3].repeat_interleave(8, 2).tanh()


def scale_wise(device: torch.device) -> tuple[Any, Backbone, Sampler, Callable[[Tensor], Tensor]]:
    """Return a VAR of seven scales and a small tokenizer."""
    tokenizer = MSVQ(
        scales=SCALES, vocab_size=512, latent_channels=8, hidden_size=16, norm_groups=8,
        channel_multipliers=[1, 2, 4], num_blocks=1, attention_levels=[], middle_attention=False,
    ).to(device)  # fmt: skip
    model = VAR(
        scales=SCALES, vocab_size=512, latent_channels=8, hidden_size=384, depth=8, num_heads=6,
        num_classes=10,
    ).to(device)  # fmt: skip
    view = NextScaleObjective().view(model.eval(), tokenizer.eval())
    return view, model, NextScale(len(SCALES)), tokenizer.decode


def searches(particles: int) -> dict[str, Search]:
    """Return searches that hold so many particles, or move so many at a time."""
    return {
        "best_of_n": BestOfN(particles),
        "fk": FeynmanKac(particles=particles),
        "svdd": SVDD(proposals=particles),
        "zero_order": ZeroOrder(neighbours=particles, rounds=1),
        "epsilon_greedy": EpsilonGreedy(candidates=particles, rounds=1),
        "tts_var": TTSVAR(samples=max(1, particles // 8)),
    }


def engine_of(family: str, device: torch.device, micro_batch: int) -> Engine:
    """Return an engine with one prompt."""
    torch.manual_seed(0)
    view, model, sampler, decode = (diffusion if family == "diffusion" else scale_wise)(device)
    cond = Conditioning(labels=torch.tensor([3], device=device))
    return Engine(
        sampler, view, cond, torch.tensor([0]), Scorer(decode, Contrast()),
        work=work_of(model, sampler), micro_batch=micro_batch,
    )  # fmt: skip


def measure(
    family: str, name: str, search: Search, device: torch.device, particles: int
) -> Overhead:
    """Run one search, after a first run that warms up."""
    for _ in range(2):
        engine = engine_of(family, device, particles)
        result = search.run(engine)
    seconds = result.cost.seconds
    return Overhead(
        family,
        name,
        seconds=result.seconds,
        network=seconds.get("network", 0.0),
        decode=seconds.get("decode", 0.0),
        reward=seconds.get("reward", 0.0),
        state_bytes=result.state_bytes,
        nfe=float(result.cost.nfe[0]),
    )


def peak(family: str, device: str, particles: int, micro_batch: int) -> float:
    """Return the megabytes that a best-of-N run adds to its process."""
    code = (
        "import sys, torch; sys.path.insert(0, '.'); from scripts.bench_search import added; "
        f"print(added({family!r}, {device!r}, {particles}, {micro_batch}))"
    )
    root = Path(__file__).resolve().parent.parent
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    return float(answer.stdout.split()[-1])


def added(family: str, device: str, particles: int, micro_batch: int) -> float:
    """Return the megabytes that a best-of-N run adds to this process."""
    where = torch.device(device)
    engine = engine_of(family, where, micro_batch)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        BestOfN(particles).run(engine)
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    before = _resident("VmRSS")
    BestOfN(particles).run(engine)
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    """Return megabytes of this process's memory that are in use, or were at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = []
    print(f"{'family':<12}{'search':<16}{'seconds':>9}{'network':>9}{'decode':>8}{'reward':>8}"
          f"{'overhead':>10}{'state B':>11}{'NFE':>7}")  # fmt: skip
    for family in ("diffusion", "scale_wise"):
        for name, search in searches(arguments.particles).items():
            sampler = engine_of(family, device, 1).sampler
            if search.problems(sampler):
                continue
            row = measure(family, name, search, device, arguments.particles)
            rows.append(row)
            print(
                f"{row.family:<12}{row.search:<16}{row.seconds:>9.2f}{row.network:>9.2f}"
                f"{row.decode:>8.2f}{row.reward:>8.2f}{row.share:>10.1%}{row.state_bytes:>11.0f}"
                f"{row.nfe:>7.0f}",
                flush=True,
            )
    memory = {}
    print(f"\n{'family':<12}{'particles':>10}{'micro-batch':>12}{'peak MB':>9}")
    for family in ("diffusion", "scale_wise"):
        for particles, micro_batch in ((64, 16), (128, 16), (64, 32), (64, 64)):
            size = peak(family, arguments.device, particles, micro_batch)
            memory[f"{family} {particles} {micro_batch}"] = size
            print(f"{family:<12}{particles:>10}{micro_batch:>12}{size:>9.1f}", flush=True)
    if arguments.json:
        text = {"device": str(device), "rows": [asdict(row) for row in rows], "peak_mb": memory}
        arguments.json.write_text(json.dumps(text, indent=2))


if __name__ == "__main__":
    main()
