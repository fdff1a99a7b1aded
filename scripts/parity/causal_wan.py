"""Parity of CausalVideo with Self Forcing's causal Wan: training masks, outputs, gradients, cache.

A case with ``input/x`` is a training forward, with clean latents beside it teacher forcing. One
with ``input/noisy`` is a roll-out: every block is seen at every step with the cache, then written
clean.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.backbones.causal_video import CausalVideo
from genscale.conditioning.base import Conditioning
from genscale.io.converters.causal_wan import config_from_official, from_official, to_official
from genscale.layers.block_mask import BlockCausalMask, block_spans
from genscale.layers.rope import rotate
from genscale.layers.video_cache import (
    VIDEO_CACHE,
    Cache,
    commit_frames,
    frame_numbers,
    frames_committed,
    frames_provisional,
)
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Run one case."""
    return _roll_out(case) if "noisy" in case.group("input") else _train(case)


def _build(case: Case, like: Tensor, **changes: Any) -> CausalVideo:
    """Build the official model for clips ``(..., C, F, H, W)`` like one."""
    official = {name: value for name, value in case.config.items() if name != "cache_tokens"}
    settings = config_from_official(official, parity=True)
    settings["input_size"] = list(like.shape[-3:])
    model: CausalVideo = CausalVideo(**{**settings, **changes})
    model.load_state_dict(from_official(case.group("state"), model))
    return model.eval()


def _train(case: Case) -> list[Comparison]:
    inputs, outputs = case.group("input"), case.group("output")
    clean = inputs.get("clean_x")
    # parity: the training mask knows no sink, and that of teacher forcing no window either
    changes: dict[str, Any] = {"sink": 0, "cache": "full"}
    if clean is not None:
        changes["window"] = 0
    model = _build(case, inputs["x"], **changes)
    cond = Conditioning(text=inputs["context"])

    def predict() -> Tensor:
        t, clean_t = inputs["t"], inputs.get("aug_t")
        sample: Tensor = model(inputs["x"], t, cond, clean=clean, clean_t=clean_t).sample
        return sample

    results = []
    for name, expected in outputs.items():
        if name == "flow":
            results.append(case.compare(name, predict(), expected))
        elif name == "attn_mask":
            results.append(case.compare(name, _mask(model, clean is not None), expected))
        else:
            raise KeyError(f"The case holds output/{name}, which this adapter does not know.")
    if grads := case.group("grad"):
        torch.autograd.backward(predict().square().mean())
        own = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        }
        found = to_official(own, model.config)
        results += [case.compare(f"grad {name}", found[name], grad) for name, grad in grads.items()]
    return results


def _mask(model: CausalVideo, teacher: bool) -> Tensor:
    mask = BlockCausalMask(
        frames=model.trained_frames,
        block_size=model.block_size,
        tokens_per_frame=model.grid[0] * model.grid[1],
        mode="teacher" if teacher else "causal",
        window=model.window,
        independent_first_frame=model.independent_first_frame,
    )
    return mask.dense().to(torch.uint8)


@torch.no_grad()
def _roll_out(case: Case) -> list[Comparison]:
    inputs = case.group("input")
    noisy, clean, steps = inputs["noisy"], inputs["clean"], inputs["steps"]
    model = _build(case, clean)
    cond = Conditioning(text=inputs["context"])
    memory = model.begin(len(clean), "cpu", torch.float32)
    flow, flow_clean = torch.zeros_like(noisy), torch.zeros_like(clean)
    spans = block_spans(clean.shape[2], model.block_size, short_first=model.independent_first_frame)
    for start, stop in spans:
        for index, t in enumerate(steps):
            output = model(noisy[index, :, :, start:stop], t[None], cond, memory)
            flow[index, :, :, start:stop], memory = output.sample, output.memory
        output = model(clean[:, :, start:stop], torch.zeros(1), cond, memory)
        flow_clean[:, :, start:stop], last = output.sample, output.memory[VIDEO_CACHE]
        memory = commit_frames(output.memory, stop - start)
    found = {
        "flow": flow,
        "flow_clean": flow_clean,
        **_contents(model, last, case.config.get("cache_tokens", 0)),
    }
    results = []
    for name, expected in case.group("output").items():
        if name not in found:
            raise KeyError(f"The case holds output/{name}, which this adapter does not know.")
        results.append(case.compare(name, found[name], expected))
    return results


def _contents(model: CausalVideo, cache: Cache, slots: int) -> dict[str, Tensor]:
    """Return what the official cache holds after the last clean block was written.

    Ours has not made room yet for the next block there, as the official one never does. Of its
    ``slots`` tokens those that were never written are zero.
    """
    numbers = frame_numbers(cache)
    rotation = model.rope.grid_rotation(
        torch.tensor(numbers), *(torch.arange(side) for side in model.grid)
    )
    frames = len(numbers)
    keys, values = (cache[name][0][:, :, :frames].flatten(2, 3) for name in ("keys", "values"))
    tokens = model.grid[0] * model.grid[1]
    empty = max(0, slots - frames * tokens)
    seen = frames_committed(cache) + frames_provisional(cache)
    return {
        "k_layer0": F.pad(rotate(keys, *rotation), (0, 0, 0, empty)).transpose(1, 2),
        "v_layer0": F.pad(values, (0, 0, 0, empty)).transpose(1, 2),
        "local_end": torch.tensor([frames * tokens]),
        "global_end": torch.tensor([seen * tokens]),
    }
