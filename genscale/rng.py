"""Keyed randomness: (seed, position or lineage, step, purpose) -> numbers, the same anywhere.

Every random number in genscale is a pure function of a 64-bit key. A key is made from a seed and
a few integers that say *what the number is for*; no generator object has a state to save, so a
run that was killed and resumed, split over processes, or batched differently draws the same
numbers. Keys are splitmix64 hashes (Steele, Lea and Flood, OOPSLA 2014) and the numbers are the
splitmix64 sequence started at the key, turned into normals with Box-Muller in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_GAMMA = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


class Purpose(IntEnum):
    """What a number is drawn for; part of every key, so no two uses share numbers."""

    SAMPLE = 1  # the seed of sample i
    INIT = 2  # the start noise of a trajectory
    STEP = 3  # the noise of a stochastic sampler step
    RENOISE = 4
    LABEL = 5  # the label of sample i, where labels are random
    NOISE = 6  # training: the noise added to the data
    TIME = 7  # training: the time of the noising process
    DROP = 8  # training: drop-out of the condition
    FLIP = 9  # training: horizontal flip
    POSTERIOR = 10  # training: the draw from an autoencoder's posterior
    SHUFFLE = 11  # the order of the data
    SUBSET = 12  # metrics: random subsets
    SMOOTH = 14  # the Gumbel noise of smooth sampling
    SELF_CONDITION = 15  # training: which samples remember a first evaluation
    REFERENCE_LEVEL = 16  # training: how noisy a low-resolution reference is
    REFERENCE = 17  # the noise of a low-resolution reference
    NETWORK = 13  # a step's seed of torch's own generator (drop-out inside a network)
    CODEBOOK = 20  # training: where codes start, and what dead ones become
    PARTICLE = 21  # search: the seed of a prompt's further particles
    BRANCH = 22  # search: the lineage of a copy
    RESAMPLE = 23  # search: which particles live on
    NEIGHBOUR = 24  # search: a direction around a noise
    CHOICE = 25  # search: whether to explore
    DIVERSITY = 26  # search: where clusters start
    PICTURE = 27  # training: which samples of a video model are still pictures
    PICTURE_ROW = 28  # training: the picture of such a sample
    CLIP = 29  # training: where in a video a clip begins, and its frame rate
    HISTORY = 30  # the noise with which finished frames of a video are read again
    WINDOW = 31  # the order in which frames of a video repeat the start noise of earlier ones
    BUCKET = 33  # training: which shape pictures have in a step
    CRITIC = 32  # self-forcing: level and noise at which samples are judged
    CROP = 40  # training: where a patch is cut from a picture
    TURN = 41  # training: how a patch is turned and mirrored
    HEAD = 42  # training: which scale of a latent upscaler learns in a step
    LOST = 43  # training: what a rescaled picture has lost, drawn anew


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right without sign extension; torch's ``>>`` on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Finalise splitmix64: a bijection of 64-bit integers with full avalanche."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def key(*fields: int | Tensor) -> Tensor:
    """Hash integers into keys.

    Args:
        fields: integers or int64 tensors of broadcastable shapes, for example
            ``key(seed, position, Purpose.NOISE)``. Order matters.

    Returns:
        int64 tensor of the broadcast shape (shape ``()`` when all fields are integers).
    """
    state = torch.zeros((), dtype=torch.int64)
    for field in fields:
        word = (
            field.to(torch.int64)
            if isinstance(field, Tensor)
            else torch.tensor(_to_signed(int(field)), dtype=torch.int64)
        )
        if word.device != state.device and state.dim() == 0:
            state = state.to(word.device)
        elif word.device != state.device:
            word = word.to(state.device)
        state = _mix(state * 5 + word + _GAMMA)
    return state


def _to_signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _bits(keys: Tensor, count: int) -> Tensor:
    """Return ``count`` 64-bit integers a key: ``(..., count)``."""
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device)
    return _mix(keys.unsqueeze(-1) + counter * _GAMMA)


def uniform(keys: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Draw float64 numbers in [0, 1): shape ``(*keys.shape, *shape)``, on the keys' device."""
    bits = _bits(keys, math.prod(shape))
    return (_shift_right(bits, 11).double() * 2.0**-53).view(*keys.shape, *shape)


def integers(keys: Tensor, high: int) -> Tensor:
    """Draw one integer in [0, high) a key."""
    return (uniform(keys) * high).long().clamp_(max=high - 1)


def normal(
    keys: Tensor, shape: tuple[int, ...] = (), *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw standard normal numbers: shape ``(*keys.shape, *shape)``, on the keys' device.

    The numbers of a key depend on nothing but the key and their place in ``shape``. They are
    computed in float64 and then rounded, so that devices agree (MPS, which has no float64,
    computes them on the CPU).
    """
    device = keys.device
    if device.type == "mps":
        return normal(keys.cpu(), shape, dtype=dtype).to(device)
    count = math.prod(shape)
    bits = _bits(keys, (count + 1) // 2)
    # one 64-bit word gives both uniforms of a Box-Muller pair, 32 bits each
    u1 = (_shift_right(bits, 32).double() + 0.5) * 2.0**-32
    u2 = (bits & 0xFFFFFFFF).double() * (2.0**-32 * 2 * math.pi)
    radius = torch.sqrt(-2.0 * torch.log(u1))
    pairs = torch.stack((radius * torch.cos(u2), radius * torch.sin(u2)), dim=-1)
    return pairs.flatten(-2)[..., :count].to(dtype).view(*keys.shape, *shape)


def permutation(key_: Tensor, n: int) -> Tensor:
    """Return a permutation of ``0..n-1`` (int64) that is a function of one key."""
    return torch.argsort(_bits(key_.reshape(()), n), stable=True)


@dataclass(frozen=True, slots=True)
class StepRandom:
    """The numbers of one training batch, addressed by each sample's place in the global stream.

    Args:
        seed: the run's seed.
        position: ``(B,)`` int64 global stream positions (not rows of the data set).
    """

    seed: int
    position: Tensor

    def normal(self, purpose: Purpose, shape: tuple[int, ...]) -> Tensor:
        """Draw ``(B, *shape)`` float32 standard normals."""
        return normal(key(self.seed, self.position, purpose), shape)

    def uniform(self, purpose: Purpose) -> Tensor:
        """Draw ``(B,)`` float64 uniforms in [0, 1)."""
        return uniform(key(self.seed, self.position, purpose))

    def integers(self, purpose: Purpose, high: int) -> Tensor:
        """Draw ``(B,)`` int64 numbers in [0, high)."""
        return integers(key(self.seed, self.position, purpose), high)


def for_step(seed: int, position: Tensor) -> StepRandom:
    """Return the random numbers of a batch; see :class:`StepRandom`."""
    return StepRandom(seed, position)


def sample_seeds(seed: int, start: int, count: int) -> Tensor:
    """Return the ``(count,)`` int64 seeds of samples ``start .. start + count - 1`` of a run."""
    return key(seed, torch.arange(start, start + count), Purpose.SAMPLE)


class Stacked:
    """parity: one torch CPU generator a sample, as EDM's programs seed theirs (seed mod 2^32).

    Unlike everything else here it has a state: draws come in the order of the calls. It exists to
    repeat published samples; the rows of a seed do not depend on the other seeds.

    Args:
        seeds: ``(B,)`` int64 or a list of integers.
    """

    def __init__(self, seeds: Tensor | list[int]) -> None:
        numbers = seeds.tolist() if isinstance(seeds, Tensor) else seeds
        self.generators = [torch.Generator("cpu").manual_seed(n % (1 << 32)) for n in numbers]

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw ``(B, *shape)`` standard normals, on the CPU."""
        rows = [
            torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
            for generator in self.generators
        ]
        return torch.stack(rows)

    def integers(self, high: int) -> Tensor:
        """Draw ``(B,)`` int64 numbers in [0, high), on the CPU."""
        rows = [
            torch.randint(high, (), generator=generator, device="cpu")
            for generator in self.generators
        ]
        return torch.stack(rows)


def stacked(seeds: Tensor | list[int]) -> Stacked:
    """Return one torch generator a seed; see :class:`Stacked`."""
    return Stacked(seeds)
