"""A video as a small one and a few networks that know nothing but it.

Li et al., "Towards High-Quality and Efficient Video Super-Resolution via Spatial-Temporal Data
Overfitting", arXiv:2303.08331. Frames are cut into patches; a general upscaler tells how hard each
of them is; patches of like difficulty share a network, wherever and whenever they are seen.
All networks learn at once, as one batched network. That one network for all may see hard patches
more often is from the paper; by how much is genscale's choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from genscale.errors import ConfigError, DataError
from genscale.rng import Purpose, key, permutation, uniform
from genscale.upscaling.base import Upscaler

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overfit:
    """How networks are fitted to the patches of one video.

    Args:
        epochs: how often every patch is seen.
        batch_size: patches of one step of one network.
        lr: of Adam; falls to ``lr_end`` along half a cosine.
        lr_end: at the last step.
        joint: one network for all chunks that sees a patch the more often the harder its chunk
            is, in place of one network a chunk.
        seed: of the order of the patches.

    Raises:
        ConfigError: a value out of range.
    """

    epochs: int = 50
    batch_size: int = 16
    lr: float = 1e-3
    lr_end: float = 4e-8
    joint: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 <= self.lr_end <= self.lr:
            raise ConfigError(
                "epochs and batch_size must be at least 1 and lr_end between 0 and lr, but "
                f"{self.epochs}, {self.batch_size}, {self.lr_end} and {self.lr} were given; "
                "change them."
            )


def cut_patches(frames: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut every frame into ``rows x columns`` patches.

    Args:
        frames: ``(T, C, H, W)``.
        grid: rows and columns.

    Returns:
        ``(T * rows * columns, C, H / rows, W / columns)``, row by row, frame by frame.

    Raises:
        DataError: sides that do not divide.
    """
    rows, columns = grid
    if min(grid) < 1 or frames.shape[2] % rows or frames.shape[3] % columns:
        raise DataError(
            f"Frames of {frames.shape[2]}x{frames.shape[3]} cannot be cut into {rows} rows and "
            f"{columns} columns of equal patches; change the grid, or crop the frames."
        )
    cells = frames.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # (T, C, r, h, c, w)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def join_patches(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put frames ``(T, C, H, W)`` together again; undoes :func:`cut_patches`."""
    rows, columns = grid
    cells = patches.unflatten(0, (-1, rows, columns))  # (T, r, c, C, h, w)
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def squared_errors(made: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of every patch in [0, 1]: float64 ``(n,)``."""
    return (made.double() - target.double()).square().flatten(1).mean(1)


def pooled_psnr(errors: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of the mean of squared errors on [0, 1]."""
    return -10.0 * torch.log10(errors.mean())


def chunks_by_difficulty(errors: Tensor, count: int) -> Tensor:
    """Cut patches into chunks of like difficulty, the hardest first.

    Args:
        errors: ``(n,)`` squared errors of a general upscaler.
        count: chunks; their sizes differ by one at most.

    Returns:
        ``(n,)`` int64, the chunk of every patch.

    Raises:
        DataError: fewer patches than chunks.
    """
    if not 1 <= count <= len(errors):
        raise DataError(
            f"{len(errors)} patches cannot be cut into {count} chunks; give 1 to {len(errors)}."
        )
    chunk = torch.empty(len(errors), dtype=torch.int64)
    order = torch.argsort(errors.cpu(), descending=True, stable=True)
    chunk[order] = torch.arange(len(errors)) * count // len(errors)
    return chunk


def fit_chunks(
    build: Callable[[], Upscaler], small: Tensor, large: Tensor, chunk: Tensor, how: Overfit
) -> Weights:
    """Fit one network a chunk, or one for all, by the mean absolute error.

    Args:
        build: makes a network with weights from torch's generator; called once a network.
        small: ``(n, C, h, w)`` patches in [0, 1].
        large: ``(n, C, h * scale, w * scale)``.
        chunk: ``(n,)`` of :func:`chunks_by_difficulty`.
        how: settings.

    Returns:
        weights by name, each ``(networks, *shape)``.
    """
    count = int(chunk.max()) + 1
    networks = [build() for _ in range(1 if how.joint else count)]
    for network in networks:
        torch.nn.Module.to(network, small.device)
    weights, buffers = stack_module_state(networks)
    optimizer = torch.optim.Adam(list(weights.values()), lr=how.lr)
    evaluate = _together(networks[0])
    steps_an_epoch = math.ceil(len(small) / (len(networks) * how.batch_size))
    total = how.epochs * steps_an_epoch
    for step in range(total):
        rows = _rows(chunk, count, step, steps_an_epoch, how)  # (networks, B)
        part = 0.5 + 0.5 * math.cos(math.pi * step / total)
        for group in optimizer.param_groups:
            group["lr"] = how.lr_end + (how.lr - how.lr_end) * part
        made = evaluate(weights, buffers, small[rows])
        # networks share no weight: the gradient of each is that of its own mean
        loss = (made - large[rows]).abs().flatten(1).mean(1).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return {**{name: weight.detach() for name, weight in weights.items()}, **buffers}


@torch.no_grad()
def upscale_chunks(
    network: Upscaler, weights: Weights, small: Tensor, chunk: Tensor, batch: int = 64
) -> Tensor:
    """Upscale every patch by its chunk's network.

    Args:
        network: gives the architecture.
        weights: of :func:`fit_chunks`; of a single network they are for all patches.
        small: ``(n, C, h, w)``.
        chunk: ``(n,)``.
        batch: patches a network call.

    Returns:
        ``(n, C, h * scale, w * scale)`` within [0, 1].
    """
    scale = network.scales[0]
    height, width = (side * scale for side in small.shape[2:])
    out = small.new_empty(len(small), small.shape[1], height, width)
    networks = len(next(iter(weights.values())))
    for number in range(networks):
        own = {name: weight[number] for name, weight in weights.items()}
        mine = chunk == number if networks > 1 else torch.ones_like(chunk, dtype=torch.bool)
        for rows in mine.nonzero().flatten().split(batch):
            out[rows] = functional_call(network, own, (small[rows], scale)).clamp(0.0, 1.0)
    return out


def _together(network: Upscaler) -> Callable[[Weights, Weights, Tensor], Tensor]:
    """Return a function of stacked weights and inputs ``(networks, B, C, h, w)``."""
    scale = network.scales[0]

    def one(weights: Weights, buffers: Weights, x: Tensor) -> Tensor:
        out: Tensor = functional_call(network, (weights, buffers), (x, scale))
        return out

    return vmap(one)


def _rows(chunk: Tensor, count: int, step: int, steps_an_epoch: int, how: Overfit) -> Tensor:
    """Return the patches of one step: ``(networks, batch_size)``.

    A chunk's patches come in a new order every epoch and begin again where they run out.
    """
    epoch, place = divmod(step, steps_an_epoch)
    if how.joint:
        # chunk c of k weighs k - c
        weight = (count - chunk).double()
        keys = key(how.seed, step, torch.arange(how.batch_size), Purpose.SHUFFLE)
        ends = weight.cumsum(0)
        drawn = torch.searchsorted(ends, uniform(keys) * ends[-1], right=True)
        return drawn.clamp(max=len(chunk) - 1)[None]
    along = place * how.batch_size + torch.arange(how.batch_size)
    rows = []
    for number in range(count):
        own = (chunk == number).nonzero().flatten()
        order = permutation(key(how.seed, epoch, number, Purpose.SHUFFLE), len(own))
        rows.append(own[order[along % len(own)]])
    return torch.stack(rows)
