"""Quaternions: products that keep lengths, wavelets that come back, features that scale others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.layers.feature_modulation import FeatureModulation, TimeAwareBlock, TimeAwareEncoder
from genscale.layers.quaternion import QuaternionConv, hamilton_product
from genscale.layers.quaternion_wavelet import (
    QuaternionBands,
    inverse_quaternion_wavelet,
    magnitude,
    quaternion_wavelet,
    wavelet_matrix,
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_the_units_multiply_as_hamilton_found() -> None:
    one, i, j, k = torch.eye(4).unsqueeze(1)
    assert torch.equal(hamilton_product(i, j), k)
    assert torch.equal(hamilton_product(j, i), -k)
    assert torch.equal(hamilton_product(j, k), i)
    assert torch.equal(hamilton_product(k, i), j)
    for unit in (i, j, k):
        assert torch.equal(hamilton_product(unit, unit), -one)


def test_a_convolution_multiplies_from_the_left() -> None:
    conv = QuaternionConv(1, 1, kernel_size=1).double()
    x = numbers(2, 4, 3, 5)
    weight = conv.weight.detach().view(1, 4, 1, 1).expand(2, 4, 3, 5)
    with torch.no_grad():
        out = conv(x)
    torch.testing.assert_close(out, hamilton_product(weight, x))
    # lengths multiply, too
    length = conv.weight.detach().norm() * x.norm(dim=1)
    torch.testing.assert_close(out.norm(dim=1), length)


def test_channels_and_places_add_up() -> None:
    conv = QuaternionConv(3, 2, kernel_size=3, stride=2).double()
    x = numbers(1, 12, 6, 6)
    expected = torch.zeros(1, 8, 3, 3, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1)).unflatten(1, (4, 3))
    with torch.no_grad():
        for a in range(3):
            for b in range(3):
                seen = padded[:, :, :, a : a + 6 : 2, b : b + 6 : 2]
                for source in range(3):
                    weight = conv.weight[:, :, source, a, b]  # (4, out)
                    for target in range(2):
                        own = weight[:, target].view(1, 4, 1, 1).expand(1, 4, 3, 3)
                        product = hamilton_product(own, seen[:, :, source])
                        expected[:, target::2] += product
        torch.testing.assert_close(conv(x), expected)
    real = torch.nn.Conv2d(12, 8, 3)
    assert conv.weight.numel() * 4 == real.weight.numel()


@pytest.mark.parametrize("levels", [1, 3])
def test_wavelets_come_back(levels: int) -> None:
    x = numbers(2, 3, 16, 24)
    bands = quaternion_wavelet(x, levels)
    assert isinstance(bands, QuaternionBands)
    assert bands.low.shape == (2, 3, 4, 16 >> levels, 24 >> levels)
    assert [tuple(high.shape[2:4]) for high in bands.high] == [(3, 4)] * levels
    torch.testing.assert_close(inverse_quaternion_wavelet(bands), x)
    # every tree alone is orthonormal
    energy = bands.low.square().sum() + sum(high.square().sum() for high in bands.high)
    torch.testing.assert_close(energy, 4 * x.square().sum())
    matrix = wavelet_matrix(16, 1, level=1)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_trees_are_nearly_a_hilbert_pair(level: int) -> None:
    waves = []
    for tree in (0, 1):
        means = torch.eye(256, dtype=torch.float64)
        for finer in range(level):
            size = len(means)
            means = (wavelet_matrix(size, tree, finer) @ means)[: size // 2]
        size = len(means)
        waves.append((wavelet_matrix(size, tree, level) @ means)[size * 3 // 4])
    spectrum = torch.fft.fft(waves[0] + 1j * waves[1]).abs().square()
    sides = sorted([float(spectrum[1:128].sum()), float(spectrum[129:].sum())])
    assert sides[0] < 0.01 * sides[1]  # one real wavelet has as much on both sides


def test_lengths_move_less_than_wavelets_where_the_picture_moves() -> None:
    whole, single = [], []
    for shift in range(8):
        x = torch.zeros(1, 1, 16, 64)
        x[..., 20 + shift : 44 + shift] = 1.0
        columns = quaternion_wavelet(x, 3).high[2][:, :, 0]
        whole.append(float(magnitude(columns, dim=2).square().sum()))
        single.append(float(columns[:, :, 0].square().sum()))
    variation = [float(np.std(values) / np.mean(values)) for values in (whole, single)]
    assert variation[0] < 0.5 * variation[1]


def test_modulation_begins_as_nothing() -> None:
    torch.manual_seed(0)
    layer = FeatureModulation(6, 3, hidden_size=4)
    h, condition = torch.randn(2, 6, 8, 8), torch.randn(2, 3, 4, 4)
    assert torch.equal(layer(h, condition), h)
    with torch.no_grad():
        layer.out.bias[:6] = 1.0  # gamma
        layer.out.bias[6:] = 0.5  # beta
    torch.testing.assert_close(layer(h, condition), 2.0 * h + 0.5)
    layer.reset_parameters()
    assert torch.equal(layer(h, condition), h)


def test_the_encoder_knows_the_time_and_gives_a_map_a_level() -> None:
    torch.manual_seed(0)
    encoder = TimeAwareEncoder(4, 16, [8, 16, 16])
    assert isinstance(encoder.blocks[0], TimeAwareBlock)
    condition, embedding = torch.randn(2, 4, 8, 12), torch.randn(2, 16)
    features = encoder(condition, embedding)
    assert [tuple(f.shape) for f in features] == [(2, 8, 8, 12), (2, 16, 4, 6), (2, 16, 2, 3)]
    later = encoder(condition, embedding + 1.0)
    assert all(not torch.equal(a, b) for a, b in zip(features, later, strict=True))
    alone = encoder(condition[1:], embedding[1:])
    torch.testing.assert_close(alone[2], features[2][1:], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match="pictures of 12x16 were given"):
        quaternion_wavelet(torch.zeros(1, 1, 12, 16), levels=3)
    with pytest.raises(ConfigError, match="each a multiple of groups=8"):
        TimeAwareEncoder(4, 16, [8, 12])
