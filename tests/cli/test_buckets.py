"""data.buckets on the command line: trained on, resumed by name, refused where it cannot be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from genscale.autoencoders.identity import Identity
from genscale.autoencoders.msvq import TrainedMSVQ
from genscale.backbones.dit import DiT
from genscale.cli.bucketing import check_shapes, no_buckets
from genscale.errors import ConfigError


def data(*buckets: tuple[int, int]) -> SimpleNamespace:
    return SimpleNamespace(buckets=list(buckets) or None)


def test_buckets_must_fit_the_network() -> None:
    model = DiT(input_size=8, in_channels=3, patch_size=4, hidden_size=16, depth=1, num_heads=2)
    check_shapes(data(), model, Identity(latent_channels=3))
    check_shapes(data((8, 8), (4, 12)), model, Identity(latent_channels=3))
    with pytest.raises(ConfigError, match=r"data\.buckets has \[6, 12\], but .* multiples of 4"):
        check_shapes(data((8, 8), (6, 12)), model, Identity(latent_channels=3))
    tokens = TrainedMSVQ.__new__(TrainedMSVQ)  # its kind is all that matters
    with pytest.raises(ConfigError, match="learns the tokens of one schedule"):
        check_shapes(data((8, 8)), model, tokens)


def test_what_learns_one_size_refuses_them() -> None:
    assert no_buckets(data(), "KLSmall") == []
    assert "KLSmall learns from pictures of one size" in no_buckets(data((8, 8)), "KLSmall")[0]
