"""A small network that changes a noise: its weights can be optimised in the noise's place."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from genscale import rng
from genscale.rng import Purpose

_KERNEL = 3
_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class NoiseModifier:
    """z + M(z), with M three convolutions of kernel 3 and SiLU between, the last of them zero.

    Every particle has weights of its own. As they act on all places alike, they change a noise
    in fewer ways than its elements could (the modifier of D2D, arXiv:2510.19278, in a form of
    ours).

    Args:
        shape: of one noise, ``(C, *places)``.
        width: channels between the convolutions.

    Attributes:
        size: number of weights D a particle.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 32) -> None:
        self.shape, channels = shape, (shape[0], width, width, shape[0])
        places = len(shape) - 1
        self.convolve = _CONVOLUTIONS[places]
        kernel = (_KERNEL,) * places
        self.shapes = [(out, into, *kernel) for into, out in pairwise(channels)]
        self.size = sum(math.prod(each) + each[0] for each in self.shapes)

    def initial(self, seeds: Tensor) -> Tensor:
        """Return weights ``(n, D)`` of particles ``(n,)`` (int64), with which nothing changes."""
        parts = []
        for layer, shape in enumerate(self.shapes):
            numbers = math.prod(shape)
            weight = rng.normal(rng.key(seeds, layer, Purpose.NEIGHBOUR), (numbers,))
            last = layer == len(self.shapes) - 1
            # variance 2 / inputs keeps the size of what passes through (arXiv:1502.01852)
            scale = 0.0 if last else math.sqrt(2.0 * shape[0] / numbers)
            parts += [scale * weight, weight.new_zeros(len(weight), shape[0])]
        return torch.cat(parts, 1)

    def __call__(self, weights: Tensor, noise: Tensor) -> Tensor:
        """Return noises ``(n, C, *places)``, each changed by its own weights ``(n, D)``."""
        count, first = len(noise), 0
        # one group of channels a particle: all particles in one call
        x = noise.reshape(1, count * self.shape[0], *self.shape[1:])
        for layer, shape in enumerate(self.shapes):
            numbers = math.prod(shape)
            middle = first + numbers
            kernel = weights[:, first:middle].reshape(count * shape[0], *shape[1:])
            bias = weights[:, middle : middle + shape[0]].reshape(-1)
            first = middle + shape[0]
            x = functional.silu(x) if layer > 0 else x
            x = self.convolve(x, kernel, bias, padding=_KERNEL // 2, groups=count)
        return noise + x.view_as(noise)
