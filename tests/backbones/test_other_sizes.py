"""Every backbone at sizes and proportions that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.autoencoders.msvq import MSVQ, TrainedMSVQ
from genscale.backbones.base import Backbone, ScaleBackbone
from genscale.backbones.causal_video import CausalVideo
from genscale.backbones.dimr import DiMR
from genscale.backbones.dit import DiT
from genscale.backbones.fit import FIT
from genscale.backbones.lamamba import LaMamba
from genscale.backbones.mvar import MVAR
from genscale.backbones.rin import RIN
from genscale.backbones.switti import Switti
from genscale.backbones.uvit import UViT
from genscale.backbones.var import VAR
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.position_tables import resize_position_table
from genscale.layers.scales import as_scales, features_at, scale_spans, stretched_scales
from genscale.objectives.next_scale import NextScale as NextScaleObjective
from genscale.objectives.scale_view import ScaleView
from genscale.samplers.next_scale import NextScale
from genscale.search.setup import work_of

SMALL = {"in_channels": 2, "num_classes": 3, "hidden_size": 16, "num_heads": 2}
VIDEO = {"in_channels": 2, "hidden_size": 24, "depth": 1, "num_heads": 2, "mlp_size": 24}
NETWORKS: dict[str, Callable[[], Backbone]] = {
    "dit": lambda: DiT(input_size=8, depth=1, **SMALL),
    "dit_text": lambda: DiT(
        input_size=8, depth=1, **SMALL, text_size=6, num_text_tokens=2, pooled_text_size=4
    ),
    "dit_nala": lambda: DiT(input_size=8, depth=1, attention="nala", **SMALL),
    "uvit": lambda: UViT(input_size=8, depth=3, **SMALL),
    "dimr": lambda: DiMR(
        input_size=8, in_channels=2, num_classes=3, hidden_sizes=(16, 8), depths=(3, 1), num_heads=2
    ),
    "dimr_rope": lambda: DiMR(
        input_size=8, in_channels=2, num_classes=3, hidden_sizes=(16, 8), depths=(3, 1),
        num_heads=2, position="axial_rope",
    ),
    "lamamba": lambda: LaMamba(
        input_size=8, in_channels=2, num_classes=3, patch_size=2, hidden_sizes=(8, 16, 32, 32),
        depths=(1, 1, 1, 1), bottleneck_depth=1, num_heads=2, window_size=2,
    ),
    "fit": lambda: FIT(
        input_size=[2, 8, 8], in_channels=2, patch_size=[1, 2, 2], group_size=[2, 2, 2],
        patch_width=16, latent_width=16, context_width=16, num_latents=48, depth=1, global_depth=1,
        patch_head_size=8, latent_head_size=8,
    ),
    "rin": lambda: RIN(
        input_size=8, in_channels=2, num_classes=3, patch_size=2, tape_width=16, latent_width=16,
        num_latents=4, depth=1, compute_depth=1, num_heads=2, head_size=8,
    ),
    "causal_video": lambda: CausalVideo(input_size=[4, 8, 8], block_size=2, **VIDEO),
}  # fmt: skip


def awake(network: Backbone) -> Backbone:
    """Return a network none of whose parts still stands at zero, in eval mode."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def call(network: Backbone, height: int, width: int) -> Tensor:
    """Return the prediction for one noisy input of a size."""
    shape = (*network.sample_shape[:-2], height, width)
    torch.manual_seed(1)
    with torch.no_grad():
        x = torch.randn(1, *shape)
        return network(x, torch.full((1,), 0.3), network.example_condition("cpu")).sample


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_and_proportions_of_no_training_are_read(name: str) -> None:
    network = awake(NETWORKS[name]())
    rows, columns = network.size_step
    for height, width in ((12, 8), (16, 16)):
        assert height % rows == width % columns == 0
        assert network.size_problem(height, width) is None
        y = call(network, height, width)
        assert y.shape[-2:] == (height, width)
        assert bool(y.isfinite().all())


@pytest.mark.parametrize("name", ["dit", "uvit", "dimr", "causal_video"])
def test_positions_tell_the_cells_of_other_grids_apart(name: str) -> None:
    """Of a constant picture, predictions differ from place to place by positions alone."""
    network = awake(NETWORKS[name]())
    shape = (*network.sample_shape[:-2], 12, 8)
    with torch.no_grad():
        y = network(torch.ones(1, *shape), torch.ones(1), network.example_condition("cpu")).sample
    rows, columns = network.size_step
    cells = y[..., ::rows, ::columns]
    if name == "causal_video":  # rotary positions alone leave a constant picture constant
        assert float(cells.std(dim=(-2, -1)).max()) < 1e-5
    else:
        assert float(cells.diff(dim=-1).abs().min()) > 1e-6
        assert float(cells.diff(dim=-2).abs().min()) > 1e-6


def test_rows_and_columns_of_a_video_can_keep_their_place_in_the_picture() -> None:
    extended = awake(NETWORKS["causal_video"]())
    stretched = awake(
        CausalVideo(input_size=[4, 8, 8], block_size=2, position_resize="interpolate", **VIDEO)
    )
    assert torch.equal(call(extended, 8, 8), call(stretched, 8, 8))  # as trained: the same bits
    assert not torch.allclose(call(extended, 16, 8), call(stretched, 16, 8))
    rows, columns = stretched._sides((8, 4), torch.device("cpu"))
    assert rows.tolist() == [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25]
    assert columns.tolist() == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="position_resize"):
        CausalVideo(input_size=[4, 8, 8], position_resize="crop", **VIDEO)  # type: ignore[arg-type]


def test_a_video_goes_on_at_another_size_as_it_was_begun() -> None:
    """Frames with a cache equal all frames at once, at a size of no training."""
    network = awake(NETWORKS["causal_video"]())
    torch.manual_seed(2)
    x, t, cond = torch.randn(1, 2, 2, 12, 8), torch.full((1,), 0.5), Conditioning()
    with torch.no_grad():
        whole = network(x, t, cond).sample
        memory = network.begin(1, "cpu", shape=(2, 4, 12, 8))  # type: ignore[operator]
        found = network(x, t, cond, memory).sample
    assert torch.allclose(found, whole, atol=1e-5)


def test_what_cannot_be_reached_is_said() -> None:
    fit = NETWORKS["fit"]()
    assert fit.size_step == (4, 4)  # patches of 2 in groups of 2
    assert "10 groups" in (fit.size_problem(8, 20) or "")
    assert fit.size_problem(12, 8) is None  # 6 groups share out 48 latents
    windows = [{"kernel": [1, 3, 3]}]
    wide = FIT(
        input_size=[2, 12, 12], in_channels=2, patch_size=[1, 2, 2], group_size=[2, 2, 2],
        patch_width=16, latent_width=16, context_width=16, num_latents=36, depth=1, global_depth=1,
        patch_head_size=8, latent_head_size=8, extra_inputs=windows,
    )  # fmt: skip
    assert wide.size_step == (12, 12)
    gated = UViT(input_size=8, depth=3, skip_scale="gate", **SMALL)
    assert "gates" in (gated.size_problem(12, 12) or "")
    assert gated.size_problem(8, 8) is None
    cropped = UViT(input_size=8, depth=3, position_resize="crop", **SMALL)
    assert "cropped" in (cropped.size_problem(8, 12) or "")
    assert cropped.size_problem(8, 4) is None
    assert NETWORKS["dimr"]().size_step == (2, 2)


SCALES = (1, 2, 3, 4)
TOKENS = {"scales": SCALES, "latent_channels": 4, "vocab_size": 12}
SCALE_WISE: dict[str, Callable[[], ScaleBackbone]] = {
    "var": lambda: VAR(**TOKENS, num_classes=3, hidden_size=16, depth=2, num_heads=2),
    "mvar": lambda: MVAR(
        **TOKENS, num_classes=3, hidden_size=16, depth=1, num_heads=2, state_size=4,
        scan_head_size=8,
    ),
    "switti": lambda: Switti(
        **TOKENS, text_size=8, num_text_tokens=3, pooled_text_size=8, hidden_size=16, depth=1,
        num_heads=2,
    ),
    "switti_ar": lambda: Switti(
        **TOKENS, text_size=8, num_text_tokens=3, pooled_text_size=8, hidden_size=16, depth=1,
        num_heads=2, use_ar=True, rope=False,
    ),
}  # fmt: skip


def tokenizer() -> MSVQ:
    torch.manual_seed(3)
    msvq = MSVQ(**TOKENS, hidden_size=8, channel_multipliers=(1, 2), num_blocks=1, norm_groups=4)
    torch.nn.init.normal_(msvq.quantizer.embedding.weight)
    return msvq.eval()


def test_scales_stretch_from_coarse_to_fine() -> None:
    published = tuple((s, s) for s in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    doubled = stretched_scales(published, 32, 32)
    assert [h for h, _ in doubled] == [1, 2, 3, 5, 7, 9, 13, 17, 24, 32]
    assert stretched_scales(published, 16, 16) is published
    oblong = stretched_scales(published, 16, 24)
    assert [h for h, _ in oblong] == [h for h, _ in published]
    assert oblong[0] == (1, 1)
    assert oblong[-1] == (16, 24)
    small = stretched_scales(published, 4, 4)
    assert small[-1] == (4, 4)
    assert as_scales(small) == small  # which refuses scales that shrink
    assert stretched_scales(((4, 4),), 6, 2) == ((6, 2),)


@pytest.mark.parametrize("name", SCALE_WISE)
def test_scale_wise_networks_predict_at_other_sizes_as_they_were_taught(name: str) -> None:
    """Scale by scale with memory equals all scales at once; the network itself stays as it was."""
    network = awake(SCALE_WISE[name]())
    wide = network.at_size(4, 6)  # type: ignore[attr-defined]
    assert wide.scales == ((1, 1), (2, 2), (3, 4), (4, 6))
    assert wide.sample_shape == (4, 4, 6)
    assert network.scales == ((1, 1), (2, 2), (3, 3), (4, 4))
    assert network.at_size(4, 4) is network  # type: ignore[attr-defined]
    assert wide.blocks is network.blocks
    spans = scale_spans(wide.scales)
    torch.manual_seed(4)
    features = torch.randn(2, spans[-1][1], 4)
    cond = network.example_condition("cpu").repeat(2)
    with torch.no_grad():
        whole = wide(features, cond).logits
        memory, parts = wide.begin(cond, 2, torch.device("cpu")), []
        for k, (start, end) in enumerate(spans):
            out = wide(features[:, start:end], cond, range(k, k + 1), memory)
            memory = out.memory
            parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def test_places_are_stretched_within_each_scale_and_levels_end_with_the_last() -> None:
    network = SCALE_WISE["var"]()
    scales = ((1, 1), (2, 2), (3, 4), (4, 6), (5, 8))
    wide = network.at_scales(scales).embed  # type: ignore[attr-defined]
    own = network.embed  # type: ignore[attr-defined]
    begin, end = scale_spans(scales)[3]
    first, last = scale_spans(network.scales)[3]
    expected = resize_position_table(own.places[first:last], (4, 4), (4, 6))
    assert torch.equal(wide.places[begin:end], expected)
    assert torch.equal(wide.places[:5], own.places[:5])  # scales of the trained size
    assert torch.equal(wide.start, own.start)
    features = torch.zeros(1, 40, 4)
    with torch.no_grad():
        x = wide(features, torch.zeros(1, 16), range(4, 5))
    begin, end = scale_spans(scales)[4]
    assert torch.allclose(x[0] - wide.places[begin:end], own.word.bias + own.level.weight[3])


def test_a_view_of_another_size_has_a_tokenizer_of_its_scales() -> None:
    network, msvq = awake(SCALE_WISE["var"]()), tokenizer()
    trained = TrainedMSVQ(**TOKENS, downsample=2)
    trained._msvq = msvq
    cond, seeds = Conditioning(labels=torch.tensor([0, 1])), torch.tensor([5, 6])
    solver, found = NextScale(num_scales=4), []
    for given in (msvq, trained):
        view = NextScaleObjective().view(network, given, shape=(4, 6, 4))
        assert view.sample_shape == (4, 6, 4)
        assert view.tokenizer.scales == view.scales == ((1, 1), (2, 2), (4, 3), (6, 4))
        with torch.no_grad():
            found.append(solver.finish(solver.run(view, cond, seeds)))
        assert given.scales == ((1, 1), (2, 2), (3, 3), (4, 4))
        assert given.decode(found[-1]).shape == (2, 3, 12, 8)
    assert torch.equal(*found)
    # the running latent of the last scale is the sum that the tokenizer makes
    running = torch.zeros(1, 4, 6, 4)
    total, features = view.tokenizer.add_scale(running, torch.ones(1, 1, 4), 0)
    assert torch.equal(features, features_at(total, (2, 2)))
    same = NextScaleObjective().view(network, msvq, shape=network.sample_shape)
    assert same.backbone is network
    assert same.tokenizer is msvq


def test_a_schedule_may_have_more_scales_than_were_trained() -> None:
    network, msvq, scales = awake(SCALE_WISE["var"]()), tokenizer(), (1, 2, 3, 4, (5, 6))
    view = ScaleView(network.at_scales(scales), msvq.at_scales(scales))  # type: ignore[attr-defined]
    solver, cond = NextScale(num_scales=5), Conditioning(labels=torch.tensor([0]))
    with torch.no_grad():
        latent = solver.finish(solver.run(view, cond, torch.tensor([1])))
    assert latent.shape == (1, 4, 5, 6)
    assert msvq.scales == network.scales == ((1, 1), (2, 2), (3, 3), (4, 4))


def test_costs_follow_the_size() -> None:
    solver: Any = NextScale(num_scales=4)
    network = SCALE_WISE["var"]()
    tokens = work_of(network, solver, shape=(4, 6, 4)).tokens
    assert tokens.tolist() == [1, 4, 12, 24]
    assert work_of(network, solver).tokens.tolist() == [1, 4, 9, 16]
