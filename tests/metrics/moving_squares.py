"""Clips of a bright square that runs over dark ground: small data for metrics of clips."""

import torch
from torch import Tensor

from genscale.rng import key, uniform


def moving_squares(count: int, seed: int, frames: int = 8, size: int = 16) -> Tensor:
    """Return uint8 clips ``(count, 3, frames, size, size)``: places, speeds, colours differ."""
    draws = uniform(key(seed, torch.arange(count)), (6,)).float()
    time = torch.arange(frames)
    along = torch.arange(size)
    radius = (1.5 + 2.0 * draws[:, 4])[:, None, None]

    def covered(axis: int) -> Tensor:  # (count, frames, size)
        speed = 4.0 * draws[:, 2 + axis] - 2.0
        place = (size * draws[:, axis, None] + speed[:, None] * time) % size
        return (along - place[..., None]).abs() < radius

    inside = covered(0)[..., :, None] & covered(1)[..., None, :]
    colours = torch.tensor([[230, 40, 40], [40, 230, 40], [60, 60, 240], [230, 220, 40]])
    chosen = colours[(4 * draws[:, 5]).long()][:, :, None, None, None]
    return torch.where(inside[:, None], chosen, torch.tensor(25)).to(torch.uint8)
