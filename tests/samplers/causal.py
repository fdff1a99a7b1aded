"""A denoiser that remembers earlier frames of a video; it adds, multiplies and divides only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.layers.video_cache import (
    VIDEO_CACHE,
    CachePolicy,
    claim,
    empty_cache,
    frames_committed,
    write,
)
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.schedule import LinearFlow, NoiseProcess

CHANNELS, HEIGHT, WIDTH = 2, 1, 2


class Causal(Denoiser):
    """Estimates each frame from itself, and from all frames of earlier blocks and its own.

    What it saw of them lies in a real cache: as values, the frames themselves.
    """

    def __init__(
        self, frames: int = 6, block_size: int = 2, process: NoiseProcess | None = None
    ) -> None:
        self.process = process or LinearFlow()
        self.block_size = block_size
        self.sample_shape = (CHANNELS, frames, HEIGHT, WIDTH)
        self.device = torch.device("cpu")
        self.calls: list[tuple[int, int, int]] = []  # rows, first frame, frames of each call
        self.levels: list[Level] = []

    def begin(self, batch: int, shape: tuple[int, ...]) -> Any:
        cache = empty_cache(
            CachePolicy(block_size=self.block_size), num_layers=1, batch=batch, num_heads=1,
            tokens_per_frame=HEIGHT * WIDTH, head_size=CHANNELS, frames=shape[1], device="cpu",
            dtype=torch.float64,
        )  # fmt: skip
        return {VIDEO_CACHE: cache}

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        frames, size = x.shape[2], self.block_size
        memory = self.begin(len(x), self.sample_shape) if memory is None else memory
        cache = memory[VIDEO_CACHE]
        self.calls.append((len(x), frames_committed(cache), frames))
        self.levels.append(level)
        cache = claim(cache, frames)
        tokens = x.permute(0, 2, 3, 4, 1).flatten(1, 3)[:, None]  # (B, 1, f N, C)
        _, values = write(cache, 0, tokens, tokens)
        seen = values[:, 0].to(x.dtype).unflatten(1, (-1, HEIGHT * WIDTH))  # (B, held + f, N, C)
        held = seen.shape[1] - frames
        sums = [seen[:, 0]]
        for frame in range(1, seen.shape[1]):  # one after the other: alike in any batch
            sums.append(sums[-1] + seen[:, frame])
        ends = [held + (frame // size + 1) * size for frame in range(frames)]
        context = torch.stack([sums[end - 1] / end for end in ends], dim=1)  # (B, f, N, C)
        context = context.unflatten(2, (HEIGHT, WIDTH)).permute(0, 4, 1, 2, 3)
        alpha, sigma = on(level.alpha, x), on(level.sigma, x)
        shift = torch.zeros(len(x)) if cond.labels is None else 0.125 * cond.labels
        shift = shift.view(-1, 1, 1, 1, 1).to(x.dtype)
        clean = (x * (alpha + 0.5) + shift) / (1 + x * x + sigma) + 0.25 * context
        noise = torch.where(sigma > 0, (x - alpha * clean) / sigma, 0.0)
        cost = torch.ones(len(x), dtype=torch.float64)
        return Prediction(clean, noise, {VIDEO_CACHE: cache}, cost)
