"""What VAR and M-VAR have in common, held to what the contract of scale-wise networks promises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from genscale.backbones.base import ScaleOutput
from genscale.backbones.mvar import MVAR
from genscale.backbones.scale_wise import (
    ClassTable,
    ScaleAttention,
    ScaleEmbedding,
    ScaleHead,
    ScaleTransformer,
    attend_by_scale,
    check_drop_path,
    gated_sum,
    plain_scales,
    spared_by_decay,
    start_weights,
)
from genscale.backbones.var import VAR
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.scales import scale_spans
from genscale.objectives.memory import cat_tensors, map_tensors, put_rows, take_rows

SCALES = ((1, 1), (2, 2), (3, 4))
SPANS = scale_spans(SCALES)
TINY: dict[str, Any] = {
    "scales": [1, 2, [3, 4]],
    "latent_channels": 3,
    "vocab_size": 7,
    "num_classes": 5,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
}
SCAN = {"state_size": 4, "scan_head_size": 8}
VARIANTS: dict[str, tuple[type[ScaleTransformer], dict[str, Any]]] = {
    "var": (VAR, {}),
    "var, plain attention": (VAR, {"l2_norm": False}),
    "var, shared modulation": (VAR, {"shared_adaln": True}),
    "var, larger first scale": (VAR, {"scales": [2, [2, 3], 4]}),
    "mvar": (MVAR, SCAN),
    "mvar, plain attention": (MVAR, {**SCAN, "l2_norm": False}),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)
both_families = pytest.mark.parametrize("name", ["var", "mvar"])


def build(name: str, seed: int = 0, **changes: Any) -> ScaleTransformer:
    """A tiny model whose weights are all random, so that nothing is at its silent start."""
    kind, settings = VARIANTS[name]
    torch.manual_seed(seed)
    model = kind(**{**TINY, **settings, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def batch(model: ScaleTransformer, size: int = 3) -> tuple[Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    length = scale_spans(model.scales)[-1][1]
    features = torch.randn(size, length, 3, generator=generator)
    return features, Conditioning(labels=torch.tensor([0, 4, -1])[:size])


def step(
    model: ScaleTransformer, features: Tensor, scale: int, memory: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Logits of one scale, and the memory behind it."""
    start, end = scale_spans(model.scales)[scale]
    one = range(scale, scale + 1)
    output = model(features[:, start:end], Conditioning(), one, memory)
    return output.logits, output.memory


def walk(model: ScaleTransformer, features: Tensor, cond: Conditioning) -> Tensor:
    """Logits of all scales, one after the other."""
    memory, parts = model.begin(cond, len(features), features.device), []
    for scale in range(len(model.scales)):
        logits, memory = step(model, features, scale, memory)
        parts.append(logits)
    return torch.cat(parts, dim=1)


# one scale at a time, or all at once


@every_variant
def test_step_by_step_equals_teacher_forcing(name: str) -> None:
    model = build(name)
    features, cond = batch(model)
    output = model(features, cond)
    assert isinstance(output, ScaleOutput)
    assert output.memory is None
    whole = output.logits
    assert whole.shape == (3, features.shape[1], 7)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(walk(model, features, cond), whole, rtol=1e-5, atol=1e-5)


@every_variant
def test_a_prefix_of_scales_gives_the_logits_of_the_whole(name: str) -> None:
    model = build(name)
    features, cond = batch(model)
    whole = model(features, cond).logits
    for scale, (_, end) in enumerate(scale_spans(model.scales)):
        for scales in (None, range(scale + 1)):
            part = model(features[:, :end], cond, scales).logits
            torch.testing.assert_close(part, whole[:, :end], rtol=1e-5, atol=1e-5)


@every_variant
def test_a_scale_sees_itself_and_those_before_it(name: str) -> None:
    model = build(name)
    features, cond = batch(model)
    spans = scale_spans(model.scales)
    whole = model(features, cond).logits
    for start, end in spans[1:]:
        changed = features.clone()
        changed[:, end - 1] += 1  # the last token of a scale
        moved = (model(changed, cond).logits - whole).abs().amax(dim=(0, 2))
        assert moved[:start].max() < 1e-6
        # attention inside a scale is not causal: its first token sees its last
        assert (moved[start:] > 1e-4).all()


@every_variant
def test_the_features_of_the_first_scale_are_not_read(name: str) -> None:
    model = build(name)
    features, cond = batch(model)
    changed = features.clone()
    changed[:, : scale_spans(model.scales)[0][1]] = float("nan")
    assert torch.equal(model(changed, cond).logits, model(features, cond).logits)


@every_variant
def test_samples_do_not_see_each_other(name: str) -> None:
    model = build(name)
    features, cond = batch(model)
    whole = model(features, cond).logits
    alone = model(features[1:2], Conditioning(labels=torch.tensor([4]))).logits
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-5, atol=1e-5)


@both_families
def test_no_square_of_the_sequence_is_ever_built(name: str) -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        sides: set[tuple[int, ...]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple) else (result,):
                if isinstance(value, Tensor):
                    self.sides.add(tuple(value.shape[-2:]))
            return result

    model = build(name, scales=[2, 3, 5])
    features, cond = batch(model)
    length = features.shape[1]
    with torch.no_grad(), Largest() as seen:
        model(features, cond)
    assert (length, 16) in seen.sides  # it watches
    assert (length, length) not in seen.sides


# memory


@both_families
def test_memory_is_tensors_whose_first_axis_is_the_particle(name: str) -> None:
    model = build(name)
    features, cond = batch(model)
    memory = model.begin(cond, 3, features.device)
    for scale in range(len(SCALES)):
        shapes: list[tuple[int, ...]] = []
        map_tensors(memory, lambda tensor: shapes.append(tuple(tensor.shape)))  # noqa: B023
        assert len(shapes) > 6
        assert all(shape[0] == 3 for shape in shapes)
        _, memory = step(model, features, scale, memory)


@every_variant
def test_rows_can_be_selected_joined_and_replaced(name: str) -> None:
    model = build(name)
    features, cond = batch(model)
    whole = model(features, cond).logits
    start, end = scale_spans(model.scales)[1]
    memory = model.begin(cond, 3, features.device)
    _, memory = step(model, features, 0, memory)

    order = torch.tensor([2, 0, 2])
    picked = take_rows(memory, order)
    logits, further = step(model, features[order], 1, picked)
    torch.testing.assert_close(logits, whole[order, start:end], rtol=1e-5, atol=1e-5)

    joined = cat_tensors([take_rows(memory, torch.tensor([1])), take_rows(memory, order)])
    rows = torch.cat((torch.tensor([1]), order))
    logits, _ = step(model, features[rows], 1, joined)
    torch.testing.assert_close(logits, whole[rows, start:end], rtol=1e-5, atol=1e-5)

    _, memory = step(model, features, 1, memory)
    replaced = put_rows(memory, torch.tensor([1]), take_rows(further, torch.tensor([0])))
    rows = torch.tensor([0, 2, 2])
    logits, _ = step(model, features[rows], 2, replaced)
    last = slice(*scale_spans(model.scales)[2])
    torch.testing.assert_close(logits, whole[rows, last], rtol=1e-5, atol=1e-5)


@both_families
def test_branches_that_share_memory_do_not_disturb_each_other(name: str) -> None:
    model = build(name)
    features, cond = batch(model)
    other = features + torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    other[:, :1] = features[:, :1]
    wanted = [model(x, cond).logits for x in (features, other)]
    with torch.no_grad():
        _, root = step(model, features, 0, model.begin(cond, 3, features.device))
        # both go on from the same memory, never copied, in turns
        memories = [root, root]
        for scale in (1, 2):
            start, end = SPANS[scale]
            for i, x in enumerate((features, other)):
                logits, memories[i] = step(model, x, scale, memories[i])
                torch.testing.assert_close(logits, wanted[i][:, start:end], rtol=1e-5, atol=1e-5)
        # the memory they came from is where it was
        logits, _ = step(model, other, 1, root)
    torch.testing.assert_close(logits, wanted[1][:, slice(*SPANS[1])], rtol=1e-5, atol=1e-5)


@both_families
def test_two_rows_a_particle_and_the_second_left_behind(name: str) -> None:
    """Guidance views memory as (B, 2, ...) and drops the second rows at late scales."""
    model = build(name)
    features, cond = batch(model)
    whole = model(features, cond).logits
    both = Conditioning.cat([cond, cond.null()]).select(torch.arange(6).view(2, 3).t().flatten())
    twice = features.repeat_interleave(2, dim=0)
    with torch.no_grad():
        memory = model.begin(both, 6, features.device)
        for scale in (0, 1):
            _, memory = step(model, twice, scale, memory)
            memory = map_tensors(memory, lambda rows: rows.unflatten(0, (3, 2)))
            memory = map_tensors(memory, lambda rows: rows.flatten(0, 1))
        pairs = map_tensors(memory, lambda rows: rows.unflatten(0, (3, 2)))
        logits, _ = step(model, features, 2, map_tensors(pairs, lambda rows: rows[:, 0]))
    torch.testing.assert_close(logits, whole[:, slice(*SPANS[2])], rtol=1e-5, atol=1e-5)


@both_families
def test_gradients_flow_through_a_walk(name: str) -> None:
    model = build(name)
    features, cond = batch(model)
    found, expected = (
        torch.autograd.grad(logits.square().mean(), list(model.parameters()))
        for logits in (walk(model, features, cond), model(features, cond).logits)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@both_families
def test_scales_out_of_order_are_noticed(name: str) -> None:
    model = build(name)
    features, cond = batch(model)
    memory = model.begin(cond, 3, features.device)
    with pytest.raises(ValueError, match="Go through the scales in order"):
        step(model, features, 1, memory)


# conditions


@every_variant
def test_missing_labels_and_minus_one_mean_the_last_row(name: str) -> None:
    model = build(name)
    features, _ = batch(model)
    null = model(features, Conditioning(labels=torch.full((3,), -1))).logits
    assert torch.equal(model(features, Conditioning()).logits, null)
    torch.testing.assert_close(walk(model, features, Conditioning()), null, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        model(features, Conditioning(labels=torch.zeros(3).long())).logits, null
    )
    with torch.no_grad():
        model.get_parameter("class_table.weight")[5] += 1
    assert not torch.allclose(model(features, Conditioning()).logits, null)


@both_families
def test_an_unconditional_model_ignores_labels(name: str) -> None:
    model = build(name, num_classes=0)
    features, cond = batch(model)
    assert torch.equal(model(features, cond).logits, model(features, Conditioning()).logits)


def test_a_class_table_refuses_other_numbers_of_labels() -> None:
    table = ClassTable(3, 4)
    assert table.weight.shape == (4, 4)
    rows = table.look_up(torch.tensor([2, -1]), 2, torch.device("cpu"))
    assert torch.equal(rows, table.weight[[2, 3]])
    with pytest.raises(ValueError, match=r"cond.labels must have shape \(3,\), but has \(2,\)"):
        table.look_up(torch.tensor([2, -1]), 3, torch.device("cpu"))


# parts against their formulas


def test_the_embedding_adds_words_levels_and_places() -> None:
    torch.manual_seed(0)
    embed = ScaleEmbedding(SCALES, 3, 8)
    for parameter in embed.parameters():
        torch.nn.init.normal_(parameter)
    features, start = torch.randn(2, 17, 3), torch.randn(2, 8)
    x = embed(features, start, range(3))
    assert embed.places is not None
    first = start + embed.start[0] + embed.level.weight[0] + embed.places[0]
    torch.testing.assert_close(x[:, 0], first)
    word = F.linear(features[:, 9], embed.word.weight, embed.word.bias)
    torch.testing.assert_close(x[:, 9], word + embed.level.weight[2] + embed.places[9])
    torch.testing.assert_close(embed(features[:, 1:5], start, range(1, 2)), x[:, 1:5])
    bare = ScaleEmbedding(SCALES, 3, 8, positions=False)
    assert bare.places is None
    bare.load_state_dict({k: v for k, v in embed.state_dict().items() if k != "places"})
    torch.testing.assert_close(bare(features, start, range(3)) + embed.places, x)


def test_the_head_scales_and_shifts_a_norm() -> None:
    torch.manual_seed(0)
    head = ScaleHead(8, 5)
    x, c = torch.randn(2, 3, 8), torch.randn(2, 8)
    scale, shift = head.modulation(F.silu(c)).chunk(2, dim=-1)
    y = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(head(x, head.modulate(c)), head.out(y))


@pytest.mark.parametrize("prefix", [True, False])
def test_attention_by_scale_is_attention_under_a_mask(prefix: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 17, 4, generator=generator).unbind(0)
    level = torch.tensor([i for i, (a, b) in enumerate(SPANS) for _ in range(b - a)])
    mask = level[:, None] >= level if prefix else level[:, None] == level
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    found = attend_by_scale(q, k, v, SPANS, prefix=prefix, scale=0.3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_attention_written_out(l2_norm: bool) -> None:
    torch.manual_seed(0)
    layer = ScaleAttention(8, 2, l2_norm=l2_norm, prefix=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 4, 8)
    q, k, v = F.linear(x, layer.qkv.weight).chunk(3, dim=-1)
    q, v = q + layer.q_bias, v + layer.v_bias  # keys have no bias
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v))
    if l2_norm:
        assert layer.log_factor is not None
        layer.log_factor.data = torch.tensor([1.0, 9.0])  # exp(9) counts as 100
        cosine = (q / q.norm(dim=-1, keepdim=True)) @ (k / k.norm(dim=-1, keepdim=True)).mT
        logits = cosine * torch.tensor([math.e, 100.0])[:, None, None]
    else:
        logits = q @ k.mT * 0.25 / 2
    y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x, [(0, 4)]), layer.out(y), rtol=1e-4, atol=1e-5)


def test_dropped_paths_keep_the_mean() -> None:
    torch.manual_seed(0)
    x, gate, y = torch.zeros(4000, 1, 2), torch.full((4000, 2), 3.0), torch.ones(4000, 1, 2)
    assert torch.equal(gated_sum(x, gate, y), torch.full_like(x, 3.0))
    some = gated_sum(x, gate, y, drop_path=0.25)[:, 0]
    assert torch.equal(some[:, 0], some[:, 1])  # a whole sample or none of it
    assert set(some.unique().tolist()) == {0.0, 4.0}
    # 4000 draws: 0.25 within four standard errors
    assert (some[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.028)


@both_families
def test_paths_are_dropped_in_training_only_and_more_often_in_later_blocks(name: str) -> None:
    model = build(name, depth=3, drop_path=0.4)
    assert [block.drop_path for block in model.blocks] == [0.0, 0.2, 0.4]
    features, cond = batch(model)
    assert torch.equal(model(features, cond).logits, model(features, cond).logits)
    model.train()
    torch.manual_seed(0)
    first = model(features, cond).logits
    assert not torch.equal(model(features, cond).logits, first)
    torch.manual_seed(0)
    assert torch.equal(model(features, cond).logits, first)


# switches that must not change numbers


@both_families
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_recomputed_blocks_give_the_same_gradients(name: str, drop_path: float) -> None:
    grads = []
    for recompute in (False, True):
        model = build(name, checkpoint_blocks=recompute, drop_path=drop_path).train()
        torch.manual_seed(0)
        loss = model(*batch(model)).logits.square().mean()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(kept, recomputed)


@every_variant
def test_bfloat16_stays_close_and_walks_alike(name: str) -> None:
    model = build(name)
    features, cond = batch(model)
    exact = model(features, cond).logits
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        rounded, walked = model(features, cond).logits, walk(model, features, cond)
        memory = model.begin(cond, 3, features.device)
    assert rounded.dtype == walked.dtype == torch.float32
    # a dozen layers, each rounding at 2^-9
    assert (rounded - exact).norm() / exact.norm() < 0.04
    assert (walked - exact).norm() / exact.norm() < 0.04
    if "cache" in memory:  # keys in half precision too, though they are normalised in float32
        assert {part.dtype for part in memory["cache"]["keys"]} == {torch.bfloat16}
    whole = model.to(torch.bfloat16)
    half = whole(features, cond).logits
    assert half.dtype == torch.float32  # the head is
    assert (half - exact).norm() / exact.norm() < 0.06
    assert (walk(whole, features, cond) - exact).norm() / exact.norm() < 0.06


@both_families
def test_the_whole_model_compiles_into_one_graph(name: str) -> None:
    model = build(name, scales=[1, 2], depth=1)
    features, cond = batch(model)

    def predict(features: Tensor, labels: Tensor) -> Tensor:
        return model(features, Conditioning(labels=labels)).logits

    torch._dynamo.reset()
    compiled = torch.compile(predict, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features, cond.labels), predict(features, cond.labels))


@both_families
def test_compiled_blocks_take_one_graph_a_scale_not_a_layer(name: str) -> None:
    model = build(name, scales=[1, 2])
    features, cond = batch(model)
    with torch.no_grad():
        expected = walk(model, features, cond)
        torch._dynamo.reset()
        graphs: list[Any] = []

        def count(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        for block in model.blocks:
            block.compile(backend=count, fullgraph=True, dynamic=False)
        torch.testing.assert_close(walk(model, features, cond), expected)
    assert len(graphs) == 2


# weights


@both_families
def test_initial_laws(name: str) -> None:
    torch.manual_seed(0)
    kind, settings = VARIANTS[name]
    model = kind(**{**TINY, **settings, "hidden_size": 128, "depth": 3, "init_gate": 1e-3})
    std = (1 / (3 * 128)) ** 0.5
    state = model.state_dict()
    deviations = {
        "blocks.0.attention.qkv.weight": std,
        "blocks.0.mlp.up.weight": std,
        "blocks.1.attention.out.weight": std / 6**0.5,
        "blocks.1.mlp.down.weight": std / 6**0.5,
        "head.out.weight": 0.02 * std,
        "head.modulation.weight": 0.5 * std,
        "embed.places": std,
        "class_table.weight": std,
    }
    for key, deviation in deviations.items():
        assert state[key].std().item() == pytest.approx(deviation, rel=0.12), key
    biases = [v for k, v in state.items() if k.endswith("bias") and "step_bias" not in k]
    assert len(biases) > 10
    assert not any(bias.any() for bias in biases)
    assert torch.equal(state["blocks.0.attention.log_factor"], torch.full((2,), math.log(4.0)))


@every_variant
def test_a_model_built_on_the_meta_device_can_be_started_later(name: str) -> None:
    kind, settings = VARIANTS[name]
    with torch.device("meta"):
        model = kind(**{**TINY, **settings})
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()  # type: ignore[operator]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert not list(model.buffers())


def test_starting_anew_is_up_to_what_blocks_scale() -> None:
    model = build("var")
    start_weights(model, 16)
    assert not model.head.out.bias.any()
    assert model.head.out.weight.std() < 0.05 * model.embed.word.weight.std()


@both_families
def test_decay_spares_vectors_and_places_but_not_the_classes(name: str) -> None:
    model = build(name)
    spared = model.no_weight_decay()
    assert spared == spared_by_decay(model)
    assert {"embed.start", "embed.places", "embed.level.weight"} < spared
    names = dict(model.named_parameters())
    assert all(names[name].dim() == 1 for name in spared if not name.startswith("embed."))
    decayed = names.keys() - spared
    assert {"class_table.weight", "embed.word.weight", "head.out.weight"} < decayed
    assert ("blocks.0.scan.conv.weight" in decayed) == (name == "mvar")
    assert all(names[name].dim() > 1 for name in decayed)


@every_variant
def test_saving_and_loading_keep_settings_and_numbers(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    inputs = batch(model)
    assert torch.equal(loaded.eval()(*inputs).logits, model(*inputs).logits)


def test_scales_are_kept_as_plain_numbers() -> None:
    assert plain_scales(((1, 1), (2, 3), 4)) == [1, [2, 3], 4]
    model = build("var", scales=OmegaConf.create([1, [2, 3]]))
    assert model.config["scales"] == [1, [2, 3]]
    assert type(model.config["scales"][1]) is list
    assert model.scales == ((1, 1), (2, 3))
    assert model.sample_shape == (3, 2, 3)


# mistakes


@both_families
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scales": [2, 1]}, r"Scales must grow from coarse to fine, but \[2, 1\]"),
        ({"num_heads": 3}, "model.hidden_size is 16, which model.num_heads=3 heads do not"),
        ({"depth": 0}, "model.depth must be an integer of at least 1, but is 0"),
        ({"vocab_size": 0}, "model.vocab_size must be an integer of at least 1, but is 0"),
        ({"num_classes": None}, "model.num_classes must be an integer of at least 0, but is None"),
        ({"mlp_ratio": 0}, "model.mlp_ratio must be positive, but is 0"),
        ({"drop_path": 1.0}, r"model.drop_path must lie in \[0, 1\), but is 1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    name: str, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build(name, **changes)


def test_no_path_may_always_be_dropped() -> None:
    check_drop_path(0.0)
    with pytest.raises(ConfigError, match=r"0\.1 \* depth / 24"):
        check_drop_path(-0.1)


@both_families
def test_features_that_do_not_fit_are_refused(name: str) -> None:
    model = build(name)
    features, cond = batch(model)
    memory = model.begin(cond, 3, features.device)
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        (r"features of shape \(B, N, 3\), but \(3, 17, 2\)", (features[..., :2], cond)),
        (r"after one of \[1, 5, 17\] tokens, but 6 were given", (features[:, :6], cond)),
        (r"range\(0, 2\) has 5 tokens, but features have 17", (features, cond, range(2))),
        (r"consecutive scales from 0 on, of 3, but range\(1, 3\)", (features, cond, range(1, 3))),
        (r"one scale with memory, of 3, but range\(0, 2\)", (features, cond, range(2), memory)),
        (r"one scale with memory, of 3, but range\(3, 4\)", (features, cond, range(3, 4), memory)),
    ]
    for sentence, inputs in wrong:
        with pytest.raises(ValueError, match=sentence):
            model(*inputs)
