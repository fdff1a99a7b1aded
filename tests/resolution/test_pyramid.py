"""Scale-wise models at larger sizes: coarse scales are read off the small picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from genscale import rng
from genscale.autoencoders.msvq import MSVQ
from genscale.backbones.base import ScaleBackbone
from genscale.backbones.dit import DiT
from genscale.backbones.mvar import MVAR
from genscale.backbones.switti import Switti
from genscale.backbones.var import VAR
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.guidance.scale_wise import ScaleGuidance
from genscale.layers.scales import scale_spans, stretched_scales
from genscale.objectives.next_scale import NextScale as NextScaleObjective
from genscale.resolution import preset_named, refusal, sample_scaled
from genscale.resolution.pyramid import Pyramid, scales_within
from genscale.resolution.sampling import Scaled, bicubic, sampler_refusal
from genscale.samplers.next_scale import NextScale
from genscale.samplers.ode import Euler

TOKENS: dict[str, Any] = {"scales": [1, 2, 3, 4], "vocab_size": 12, "latent_channels": 4}
WORDS: dict[str, Any] = {"text_size": 8, "num_text_tokens": 3, "pooled_text_size": 8}
SIZES: dict[str, Any] = {"hidden_size": 16, "depth": 1, "num_heads": 2}
NETWORKS: dict[str, Callable[[], ScaleBackbone]] = {
    "var": lambda: VAR(**TOKENS, **SIZES, num_classes=3),
    "mvar": lambda: MVAR(**TOKENS, **SIZES, num_classes=3, scan_head_size=8),
    "switti": lambda: Switti(**TOKENS, **SIZES, **WORDS),  # scales see nothing of earlier ones
}
SEEDS = torch.tensor([5, 6])
LARGE = stretched_scales(((1, 1), (2, 2), (3, 3), (4, 4)), 6, 8)
SOLVER = NextScale(num_scales=4)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tokenizer() -> MSVQ:
    torch.manual_seed(3)
    msvq = MSVQ(**TOKENS, hidden_size=8, channel_multipliers=(1, 2), num_blocks=1, norm_groups=4)
    torch.nn.init.normal_(msvq.quantizer.embedding.weight)
    return msvq.eval()


def network(name: str) -> ScaleBackbone:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def conditions(model: ScaleBackbone) -> Conditioning:
    words = model.example_condition("cpu")
    return words.repeat(2) if words.text is not None else Conditioning(labels=torch.tensor([0, 1]))


def sample(
    model: ScaleBackbone, msvq: MSVQ, preset: Any, rows: slice = slice(None), **settings: Any
) -> Scaled:
    guided = ScaleGuidance(2.0)
    return sample_scaled(
        SOLVER,
        lambda sides: guided.wrap(NextScaleObjective().view(model, msvq, shape=(4, *sides))),
        conditions(model).select(torch.arange(2)[rows]),
        SEEDS[rows],
        model=model,
        native=(4, 4),
        preset=preset,
        **{"target": LARGE[-1], "images": msvq.decode, **settings},
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_coarse_scales_are_those_of_the_enlarged_picture(name: str, tokenizer: MSVQ) -> None:
    model, wide = network(name), tokenizer.at_scales(LARGE)
    small = sample(model, tokenizer, Pyramid(), target=(4, 4))
    tokens = wide.tokens(bicubic(tokenizer.decode(small.latents), (12, 16)).clamp(-1, 1))
    # all scales kept: nothing is drawn, and the enlarged picture comes back as it was encoded
    whole = sample(model, tokenizer, Pyramid(kept=9))
    torch.testing.assert_close(whole.latents, wide.latent(tokens))
    # the others are drawn as in in-painting, where the tokens of coarse scales are known
    view = ScaleGuidance(2.0).wrap(NextScaleObjective().view(model, tokenizer, shape=(4, 6, 8)))
    state = SOLVER.start(view, conditions(model), SEEDS)
    state = state.replace(lineage=rng.key(state.lineage, 1, rng.Purpose.RENOISE))
    known = torch.arange(tokens.shape[1]) < scale_spans(LARGE)[1][1]
    state = SOLVER.complete(view, SOLVER.edit(state, tokens, known.expand_as(tokens)))
    made = sample(model, tokenizer, Pyramid(entropy=False))
    torch.testing.assert_close(made.latents, SOLVER.finish(state))
    assert not torch.equal(made.latents, whole.latents)
    # two branches of guidance; kept scales that no other one reads need no network
    spared = 0 if model.needs_prefix else 2
    assert made.nfe.tolist() == [2 * (4 + 4 - spared)] * 2


def test_a_sample_is_of_its_seed_alone_and_attention_is_scaled(tokenizer: MSVQ) -> None:
    model = network("var")
    made = sample(model, tokenizer, preset_named("pyramid"))
    one = sample(model, tokenizer, Pyramid(), slice(1, 2))
    torch.testing.assert_close(one.latents[0], made.latents[1], atol=1e-4, rtol=1e-4)
    twice = sample(model, tokenizer, Pyramid(), target=(16, 16))  # by way of 8 x 8
    assert twice.latents.shape == (2, 4, 16, 16)
    assert twice.nfe.tolist() == [2 * 3 * 4] * 2


def test_scales_a_small_picture_can_tell() -> None:
    assert LARGE == ((1, 1), (2, 3), (4, 5), (6, 8))
    assert scales_within(LARGE, (4, 4)) == 2
    assert scales_within(LARGE, (4, 5)) == 3
    assert scales_within(((2, 2), (4, 4)), (1, 1)) == 1


def test_what_does_not_fit_is_refused(tokenizer: MSVQ) -> None:
    model, preset = network("var"), Pyramid()
    with pytest.raises(ConfigError, match="kept must be a whole number"):
        Pyramid(kept=0)
    with pytest.raises(ConfigError, match="nothing decodes it"):
        sample(model, tokenizer, preset, images=None)
    with pytest.raises(ConfigError, match="enlarges pictures of the trained size"):
        sample(model, tokenizer, preset, target=(3, 3))
    dit = DiT(input_size=8, hidden_size=16, depth=1, num_heads=2)
    assert "resolution=pyramid needs tokens of growing scales" in str(refusal(dit, preset))
    sdedit = preset_named("sdedit")
    assert str(refusal(model, sdedit)).endswith("which VAR has not. Use resolution=pyramid.")
    assert "Use sampler=next_scale" in str(sampler_refusal(Euler(2), preset))
    assert sampler_refusal(SOLVER, preset) is None
    assert "needs a sampler that can begin" in str(sampler_refusal(SOLVER, sdedit))
