"""Time scale-wise sampling and training against the naive way, at the shape of VAR-d16.

python scripts/bench_scalewise.py [--depth 16] [--batch 1] [--repeats 2] [--device cpu]

On one thread of a CPU, in float32 and with random weights:

* sampling with guidance, ``cached`` (ours) against ``naive``: every scale runs all scales before it
  again, under a dense mask of all pairs of tokens. Both are guided at every scale. Of naive's 1710
  tokens a branch 680 are new, so that 2.5 is the most to be gained.
* guidance that ends before scale 7 of 10, and no guidance at all: the null half of the first seven
  scales is 23 % of the tokens more.
* a training step of a quarter of the blocks: attention scale by scale (ours) against the dense
  mask. A dispatch mode looks for tensors of (L, L) elements, of which ours must have none.

Exits with 1 where cached is below 2.2 times naive, where the guidance cut off costs more than 1.3
times no guidance, where a training step takes more than 1.05 times the dense one, or where a table
over pairs of tokens is found.

``--device cuda`` samples pictures in bfloat16 with guidance and decodes them, with VAR's tokenizer
of random weights: step by step, and as one captured CUDA graph; beside the time that its
operations take at half of the bfloat16 rate that a large matrix product reaches here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.autoencoders.msvq import MSVQ
from genscale.backbones import scale_wise
from genscale.backbones.base import parameter_count
from genscale.backbones.var import VAR
from genscale.conditioning.base import Conditioning
from genscale.flops import count_flops
from genscale.guidance.scale_wise import ScaleGuidance
from genscale.layers.scales import Scales, scale_spans
from genscale.objectives.base import Batch, ScaleDecoder, ScalePrediction
from genscale.objectives.next_scale import NextScale as Objective
from genscale.rng import for_step
from genscale.samplers.base import State
from genscale.samplers.next_scale import NextScale
from scripts.bench_scan import best_in_turns, cuda_seconds

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
GUIDANCE = 2.5
LAST_GUIDED = 7
DECODED = 32  # pictures that are decoded together
CLOSEST = 1e-4  # of the largest logit
LEAST_GAIN = 2.2
MOST_CUT = 1.3
MOST_TRAINING = 1.05
TOP_K, TOP_P = 900, 0.96


def build(depth: int, device: torch.device, num_blocks: int | None = None) -> VAR:
    """Return VAR of the width of a depth, with random weights that say different things."""
    torch.manual_seed(0)
    with torch.device(device):
        model: VAR = VAR(
            scales=SCALES,
            hidden_size=64 * depth,
            num_heads=depth,
            depth=num_blocks or depth,
            init_gate=1.0,
        )
        with torch.no_grad():
            model.head.out.weight.mul_(50.0)
    return model.eval()


def tokenizer(device: torch.device, hidden_size: int) -> MSVQ:
    """Return a tokenizer of VAR's codes and scales, with random weights."""
    torch.manual_seed(1)
    with torch.device(device):
        model: MSVQ = MSVQ(scales=SCALES, hidden_size=hidden_size)
    return model.eval().requires_grad_(False)


@contextmanager
def dense_mask(scales: Scales) -> Iterator[None]:
    """Let attention by scale run as one attention under a mask over all pairs of tokens."""
    own = scale_wise.attend_by_scale
    spans = scale_spans(scales)
    level = torch.cat([torch.full((end - begin,), k) for k, (begin, end) in enumerate(spans)])

    def attend(q: Tensor, k: Tensor, v: Tensor, spans: Any, **options: Any) -> Tensor:
        levels = level[: q.shape[2]].to(q.device)
        bias = torch.zeros(len(levels), len(levels), device=q.device, dtype=q.dtype)
        bias.masked_fill_(levels[:, None] < levels[None], float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, bias, scale=options["scale"])

    scale_wise.attend_by_scale = attend
    try:
        yield
    finally:
        scale_wise.attend_by_scale = own


def sample(model: ScaleDecoder, batch: int) -> State:
    """Sample our way."""
    sampler = NextScale(len(SCALES), top_k=TOP_K, top_p=TOP_P)
    cond = Conditioning(labels=torch.arange(batch, device=model.device))
    with torch.no_grad():
        return sampler.run(model, cond, torch.arange(batch))


def sample_naively(network: VAR, codes: MSVQ, batch: int) -> Tensor:
    """Sample as one would first: the whole prefix in every scale, both halves always."""
    view = Objective().view(network, codes)
    sampler, guidance = NextScale(len(SCALES), top_k=TOP_K, top_p=TOP_P), ScaleGuidance(GUIDANCE)
    cond = Conditioning(labels=torch.arange(batch, device=view.device))
    both = Conditioning.cat([cond, cond.null()])
    features: list[Tensor] = []

    class Prefix(ScaleDecoder):
        tokenizer, scales, vocab_size = codes, view.scales, view.vocab_size
        sample_shape, device, needs_prefix = view.sample_shape, view.device, True

        def begin(self, cond: Conditioning, batch: int) -> Any:
            return {}

        def __call__(self, new: Tensor, scale: int, cond: Any, memory: Any = None) -> Any:
            features.append(new)
            known = torch.cat(features, dim=1)
            logits = network(torch.cat((known, known)), both).logits[:, -new.shape[1] :]
            wanted, unwanted = logits.chunk(2)
            weight = guidance.weight(scale, len(SCALES))
            guided = weight * wanted - (weight - 1.0) * unwanted
            cost = torch.full((len(guided),), 2.0, dtype=torch.float64)
            return ScalePrediction(guided, {}, cost)

    with torch.no_grad(), dense_mask(view.scales):
        return sampler.run(Prefix(), cond, torch.arange(batch)).history["tokens"]


@torch.no_grad()
def disagreement(network: VAR, codes: MSVQ, tokens: Tensor) -> float:
    """Return how far logits of cached steps lie from those of all scales at once, for tokens."""
    view, sampler = Objective().view(network, codes), NextScale(len(SCALES))
    cond = Conditioning(labels=torch.arange(len(tokens), device=view.device))
    with dense_mask(view.scales):
        whole = network(codes.features(tokens), cond).logits
    state, worst = sampler.start(view, cond, torch.arange(len(tokens))), 0.0
    for begin, end in scale_spans(view.scales):
        state = sampler.evaluate(view, state)
        error = state.history["logits"][:, : end - begin] - whole[:, begin:end]
        worst = max(worst, float(error.abs().max()))
        state = sampler.commit(view, state, tokens[:, begin:end])
    return worst / float(whole.abs().max())


class PairTables(TorchDispatchMode):
    """Notes whether an operation puts out a table over all pairs of tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = tokens
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dim() >= 2:
                self.found |= tensor.shape[-2:] == (self.tokens, self.tokens)
        return out


def training_step(model: VAR, batch: Batch) -> None:
    """Run forward and backward of one batch."""
    model.zero_grad(set_to_none=True)
    loss = Objective().loss(model, batch, for_step(0, batch.position)).loss
    torch.autograd.backward(loss)


def on_cpu(depth: int, batch: int, repeats: int) -> bool:
    """Time everything on one thread; return whether all aims were met."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    network, codes = build(depth, device), tokenizer(device, hidden_size=32)
    view = Objective().view(network, codes)
    guided = ScaleGuidance(GUIDANCE)
    cut = ScaleGuidance(GUIDANCE, stop=LAST_GUIDED)
    tokens = sum(side**2 for side in SCALES)
    print(f"VAR-d{depth}, {parameter_count(network):,} parameters, batch {batch}, float32")
    error = disagreement(network, codes, sample_naively(network, codes, batch))
    print(f"logits of cached steps against the whole sequence: {error:.1e} of the largest")
    works: dict[str, Callable[[], Any]] = {
        "naive": partial(sample_naively, network, codes, batch),
        "cached": partial(sample, guided.wrap(view), batch),
        "cut off": partial(sample, cut.wrap(view), batch),
        "unguided": partial(sample, view, batch),
    }
    seconds = best_in_turns(works, repeats, time.process_time)
    for name, value in seconds.items():
        print(f"  {name:10} {value:8.2f} s  {batch * tokens / value:8.1f} tokens/s")
    gain, share = seconds["naive"] / seconds["cached"], seconds["cut off"] / seconds["unguided"]
    print(f"cached against naive: {gain:.2f} times as fast (aim {LEAST_GAIN})")
    print(f"guidance up to scale {LAST_GUIDED} against none: {share:.2f} (aim {MOST_CUT})")
    held = 2 * 2 * batch * tokens * 64 * depth * depth * 4
    print(f"keys and values of both halves: {held / 2**20:.0f} MiB")
    same = error < CLOSEST
    return same and gain >= LEAST_GAIN and share <= MOST_CUT and train_on_cpu(depth, batch, repeats)


def train_on_cpu(depth: int, batch: int, repeats: int) -> bool:
    """Compare training steps; return whether ours is no slower and free of pair tables."""
    device = torch.device("cpu")
    small = build(depth, device, num_blocks=max(depth // 4, 1)).train()
    tokens = sum(side**2 for side in SCALES)
    ids = torch.randint(4096, (batch, tokens), generator=torch.Generator().manual_seed(2))
    features = torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(3))
    position = torch.arange(batch)
    data = Batch(ids, Conditioning(labels=position), position, features=features)

    def dense() -> None:
        with dense_mask(small.scales):
            training_step(small, data)

    found = {}
    for name, step in (("by scale", partial(training_step, small, data)), ("dense", dense)):
        with PairTables(tokens) as watch:
            step()
        found[name] = watch.found
    print(f"tables over pairs of tokens: by scale {found['by scale']}, dense {found['dense']}")
    steps: dict[str, Callable[[], Any]] = {
        "dense": dense,
        "by scale": partial(training_step, small, data),
    }
    seconds = best_in_turns(steps, repeats + 1, time.process_time)
    ratio = seconds["by scale"] / seconds["dense"]
    print(
        f"training step of {len(small.blocks)} blocks: by scale {seconds['by scale']:.2f} s, dense "
        f"{seconds['dense']:.2f} s, ratio {ratio:.2f} (aim {MOST_TRAINING})"
    )
    return ratio <= MOST_TRAINING and not found["by scale"] and found["dense"]


def on_cuda(depths: list[int], batches: list[int], repeats: int) -> None:
    """Print pictures a second, decoding included."""
    device = torch.device("cuda")
    rate = matrix_rate(device)
    print(f"{torch.cuda.get_device_name()}: a bfloat16 matrix product runs at {rate:.0f} TFLOP/s")
    codes: Any = tokenizer(device, hidden_size=160)
    codes = codes.to(memory_format=torch.channels_last)
    decoding = decoder_flops(codes)
    for depth in depths:
        network: Any = build(depth, device)
        network = network.bfloat16()
        spent = 2 * count_flops(network, network.sample_shape) + decoding
        print(
            f"VAR-d{depth}, {parameter_count(network):,} parameters: {spent / 1e12:.2f} TFLOP a "
            f"picture, {0.5 * rate / (spent / 1e12):.0f} pictures/s at half that rate"
        )
        view = ScaleGuidance(GUIDANCE).wrap(Objective().view(network, codes))
        for batch in batches:
            measure(view, codes, batch, repeats, device)
        del network, view
        torch.cuda.empty_cache()


@torch.no_grad()
def measure(
    view: ScaleDecoder, codes: MSVQ, batch: int, repeats: int, device: torch.device
) -> None:
    """Print the speed of one batch size, step by step and as one graph."""
    sampler = NextScale(len(SCALES), top_k=TOP_K, top_p=TOP_P)
    labels = torch.arange(batch, device=device)
    noise = torch.randn(batch, *sampler.noise_shape(view), device=device)
    seeds = torch.arange(batch)

    def tokens_alone() -> Tensor:
        cond = Conditioning(labels=labels)
        return sampler.finish(sampler.run(view, cond, seeds, noise))

    def pictures() -> Tensor:
        latents = tokens_alone()
        with torch.autocast("cuda", torch.bfloat16):
            return torch.cat([codes.decode(part) for part in torch.split(latents, DECODED)])

    torch.cuda.reset_peak_memory_stats()
    alone, both = cuda_seconds(tokens_alone, repeats), cuda_seconds(pictures, repeats)
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"  batch {batch:3}  step by step: {batch / both:7.1f} pictures/s "
        f"({batch / alone:.1f} without decoding), peak {memory:.1f} GiB",
        flush=True,
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pictures()
    expected = pictures()
    noise_back = noise.clone()
    graph.replay()
    torch.cuda.synchronize()
    equal = torch.allclose(captured, expected, atol=0.05)
    seconds = cuda_seconds(graph.replay, repeats)
    assert torch.equal(noise, noise_back)
    print(f"  batch {batch:3}  one CUDA graph: {batch / seconds:7.1f} pictures/s, equal: {equal}")


def matrix_rate(device: torch.device) -> float:
    """Return the TFLOP/s of a large bfloat16 matrix product."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * 8192**3 / cuda_seconds(lambda: a @ a, 10) / 1e12


def decoder_flops(codes: MSVQ) -> int:
    """Count the operations of decoding one picture."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    latent = torch.zeros(
        1, codes.latent_channels, *codes.scales[-1], device=next(codes.parameters()).device
    )
    with counter, torch.no_grad():
        codes.decode(latent)
    return counter.get_total_flops()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, nargs="+", default=[16])
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 on a CPU, 16 and 64")
    parser.add_argument("--repeats", type=int, default=2, help="runs, of which the best counts")
    parser.add_argument("--device", default="cpu", type=torch.device)
    arguments = parser.parse_args()
    if arguments.device.type == "cuda":
        on_cuda(arguments.depth, arguments.batch or [16, 64], arguments.repeats)
        return 0
    passed = on_cpu(arguments.depth[0], (arguments.batch or [1])[0], arguments.repeats)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
