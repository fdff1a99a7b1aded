"""Measure what recomputation saves: bytes that a forward pass keeps for the backward pass.

python scripts/measure_activations.py [--model dit_s_2 ...] [--batch 2] [--size 32] [--channels 4]

Runs each model of conf/model once with all activations kept and once with ``checkpoint_blocks``, on
the CPU, and prints bytes a sample and the parameters' bytes in training beside them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.backbones.base import Backbone, parameter_count
from genscale.conditioning.base import Conditioning
from genscale.training.parallel import checkpoint_activations

CONF = Path(__file__).resolve().parent.parent / "conf"


def kept_bytes(model: Backbone, x: Tensor, t: Tensor, cond: Conditioning) -> int:
    """Return the bytes that autograd keeps of one forward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, t, cond)
    return sum(sizes.values())


def build(name: str, *, size: int, channels: int) -> Backbone:
    from hydra import compose, initialize_config_dir

    from genscale.cli.building import instantiate
    from genscale.cli.resolvers import register_resolvers

    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"model={name}", f"model.input_size={size}"])
    cfg.model.in_channels = channels
    model: Backbone = instantiate(cfg.model, "model")
    return model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description="What recomputation of blocks saves.")
    parser.add_argument("--model", nargs="+", default=["dit_s_2", "uvit_s_2", "dimr_xl_2r"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=4)
    arguments = parser.parse_args()
    for name in arguments.model:
        model = build(name, size=arguments.size, channels=arguments.channels)
        x = torch.randn(arguments.batch, *model.sample_shape)
        labels = torch.zeros(len(x), dtype=torch.int64)
        inputs = (x, torch.full((len(x),), 0.5), Conditioning(labels=labels))
        before = kept_bytes(model, *inputs)
        checkpoint_activations(model)
        after = kept_bytes(model, *inputs)
        print(
            f"{name}: {parameter_count(model) / 1e6:.1f} M parameters; kept a sample in float32: "
            f"{before / len(x) / 2**20:.1f} MiB, recomputed: {after / len(x) / 2**20:.1f} MiB "
            f"({after / before:.1%})",
            flush=True,
        )


if __name__ == "__main__":
    main()
