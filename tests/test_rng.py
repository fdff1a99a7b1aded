"""Numbers are functions of their key and nothing else."""

from __future__ import annotations

import pytest
import torch

from genscale import rng
from genscale.rng import Purpose


def test_bits_are_the_published_splitmix64_sequence() -> None:
    # first outputs of splitmix64 seeded with 0, from the reference implementation (Vigna)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    got = [int(b) & (2**64 - 1) for b in rng._bits(torch.tensor(0), 3)]
    assert got == expected


def test_numbers_do_not_depend_on_batch_mates_or_order() -> None:
    keys = rng.key(7, torch.arange(10), Purpose.NOISE)
    whole = rng.normal(keys, (3, 5))
    order = torch.tensor([8, 1, 1, 5])
    assert torch.equal(rng.normal(keys[order], (3, 5)), whole[order])
    assert torch.equal(rng.normal(keys[4], (3, 5)), whole[4])


def test_purposes_steps_and_seeds_give_unrelated_numbers() -> None:
    base = rng.normal(rng.key(0, 5, Purpose.NOISE), (1000,))
    others = [
        rng.key(1, 5, Purpose.NOISE),
        rng.key(0, 6, Purpose.NOISE),
        rng.key(0, 5, Purpose.TIME),
        rng.key(5, 0, Purpose.NOISE),  # the order of fields matters
    ]
    for key in others:
        correlation = torch.corrcoef(torch.stack((base, rng.normal(key, (1000,)))))[0, 1]
        assert abs(float(correlation)) < 0.12  # 1/sqrt(1000) = 0.03; four sigmas


def test_normals_have_the_moments_of_a_normal_law() -> None:
    z = rng.normal(rng.key(3, torch.arange(100), Purpose.NOISE), (2001,)).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5  # var of z^4 is 96
    assert abs((z[:, ::2][:, :1000] * z[:, 1::2]).mean()) < 5 / (n / 2) ** 0.5  # pairs


def test_uniforms_and_integers_cover_their_range() -> None:
    u = rng.uniform(rng.key(0, torch.arange(20_000), Purpose.TIME))
    assert u.dtype == torch.float64
    assert 0 <= u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    counts = torch.bincount(rng.integers(rng.key(0, torch.arange(20_000), 1), 10), minlength=10)
    assert (counts - 2000).abs().max() < 5 * (2000 * 0.9) ** 0.5


def test_permutation_is_one_and_changes_with_its_key() -> None:
    first, second = (rng.permutation(rng.key(0, epoch, Purpose.SHUFFLE), 97) for epoch in (0, 1))
    assert torch.equal(first.sort().values, torch.arange(97))
    assert not torch.equal(first, second)


def test_keys_accept_any_integers() -> None:
    huge = rng.key(2**63 + 5, torch.tensor([2**62]), -1)
    assert huge.shape == (1,)
    assert rng.normal(huge, (2,)).isfinite().all()


@pytest.mark.gpu
def test_a_gpu_draws_the_same_numbers() -> None:
    keys = rng.key(0, torch.arange(64), Purpose.NOISE)
    ours = rng.normal(keys.cuda(), (4, 32, 32)).cpu()
    torch.testing.assert_close(ours, rng.normal(keys, (4, 32, 32)), rtol=0, atol=1e-6)
