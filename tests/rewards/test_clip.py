"""CLIPScore, PickScore and HPS on small models, held to what transformers and torch compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import CheckpointError, ConfigError
from genscale.rewards.base import Request
from genscale.rewards.clip import (
    HPS,
    CLIPFolderReward,
    CLIPReward,
    CLIPScore,
    PickScore,
    image_embeddings,
)
from genscale.rewards.learned import LearnedReward, find_file
from genscale.rewards.open_clip import (
    VIT_H_14,
    OpenCLIPSizes,
    build_clip,
    from_open_clip,
    load_open_clip,
)
from genscale.rewards.preprocessing import Preprocessing
from tests.rewards.small_clip import CAPTIONS, IMAGE_SIZE, TOKENS, WORDS, pictures
from tests.rewards.small_clip import write_clip as write

REQUESTS = [Request(caption=caption) for caption in CAPTIONS]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, write(folder)


def cosines(model: Any, images: Tensor, *, exact: bool = False) -> Tensor:
    """Return every picture's cosine with every caption, by transformers alone."""
    pixels = Preprocessing(IMAGE_SIZE, exact=exact)(images)
    rows = []
    with torch.no_grad():
        for ids in TOKENS:  # each alone: no padding
            out = model(input_ids=torch.tensor([ids]), pixel_values=pixels)
            rows.append(out.logits_per_image[:, 0] / model.logit_scale.exp())
    return torch.stack(rows, dim=1)


class TestCLIPScore:
    @pytest.mark.parametrize("exact", [False, True])
    def test_the_cosine_of_transformers(self, clip: tuple[Path, Any], exact: bool) -> None:
        folder, model = clip
        reward = CLIPScore(folder=str(folder), exact=exact)
        assert isinstance(reward, CLIPFolderReward | CLIPReward | LearnedReward)
        assert reward.check() == []
        images, index = pictures(4), torch.tensor([0, 1, 1, 0])
        found = reward.score(images, reward.prepare(REQUESTS), index)
        expected = cosines(model, images, exact=exact)[torch.arange(4), index]
        torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-6)
        assert expected.std() > 0.01  # the small model tells pictures apart

    def test_scales(self, clip: tuple[Path, Any]) -> None:
        images, index = pictures(6), torch.tensor([0, 1] * 3)
        values = {}
        for scale in ("cos", "torchmetrics", "hessel"):
            reward = CLIPScore(folder=str(clip[0]), scale=scale)
            values[scale] = reward.score(images, reward.prepare(REQUESTS), index).value
            assert reward.label.startswith(f"CLIPScore({scale}, tensor, float32, weights ")
        cosine = values["cos"]
        torch.testing.assert_close(values["torchmetrics"], 100 * cosine.clamp(min=0))
        torch.testing.assert_close(values["hessel"], 2.5 * cosine.clamp(min=0))
        signs = torch.tensor([-0.5, 0.2])
        assert reward.value_of(signs).tolist() == pytest.approx([0.0, 0.5])  # of the last, hessel
        assert reward.loss_of(signs).tolist() == pytest.approx([150.0, 80.0])

    def test_batch_mates_do_not_matter(self, clip: tuple[Path, Any]) -> None:
        reward = CLIPScore(folder=str(clip[0]))
        images, index = pictures(5), torch.tensor([0, 1, 0, 1, 0])
        together = reward.score(images, reward.prepare(REQUESTS), index).value
        for i in range(5):
            alone = reward.prepare([REQUESTS[int(index[i])]])
            value = reward.score(images[i : i + 1], alone, torch.tensor([0])).value
            torch.testing.assert_close(value[0], together[i], rtol=0, atol=1e-6)

    def test_the_gradient_agrees_with_finite_differences(self, clip: tuple[Path, Any]) -> None:
        reward = CLIPScore(folder=str(clip[0]))
        handle, index = reward.prepare(REQUESTS[:1]), torch.tensor([0])
        images = pictures(1).requires_grad_()
        loss = reward.loss(images, handle, index)
        (gradient,) = torch.autograd.grad(loss.sum(), images)
        images, loss = images.detach(), loss.detach()
        direction, step = gradient / gradient.norm(), 1e-2
        ends = [
            float(reward.loss(images + sign * step * direction, handle, index)) for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float(gradient.norm()), rel=1e-2)
        assert float(loss) == pytest.approx(
            100 - 100 * float(reward.score(images, handle, index).value), abs=1e-3
        )

    def test_the_exact_route_comes_close_and_has_no_gradient(self, clip: tuple[Path, Any]) -> None:
        images, index = pictures(4), torch.zeros(4, dtype=torch.int64)
        free, exact = (CLIPScore(folder=str(clip[0]), exact=each) for each in (False, True))
        values = [each.score(images, each.prepare(REQUESTS), index).value for each in (free, exact)]
        assert 0 < (values[0] - values[1]).abs().max() < 2e-2
        assert free.differentiable
        assert not exact.differentiable
        assert free.label.replace("tensor", "pil") == exact.label != free.label
        with pytest.raises(NotImplementedError, match="CLIPScore"):
            exact.loss(images, exact.prepare(REQUESTS), index)

    def test_half_precision_inside_and_float32_outside(self, clip: tuple[Path, Any]) -> None:
        full, half = (CLIPScore(folder=str(clip[0]), precision=p) for p in ("float32", "bfloat16"))
        images, index = pictures(4), torch.zeros(4, dtype=torch.int64)
        one, other = (each.score(images, each.prepare(REQUESTS), index) for each in (full, half))
        assert other.value.dtype == torch.float32
        assert 0 < (one.value - other.value).abs().max() < 0.05
        assert {p.dtype for p in half.network.parameters()} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):  # of a caller: it does not reach the reward
            inside = full.score(images, full.prepare(REQUESTS), index).value
        torch.testing.assert_close(inside, one.value, rtol=0, atol=0)

    def test_long_captions_are_cut(self, clip: tuple[Path, Any]) -> None:
        reward = CLIPScore(folder=str(clip[0]))
        handle = reward.prepare([Request("two red circle two red circle")])
        torch.testing.assert_close(handle, reward.prepare([Request("two red circle two")]))

    def test_the_network_is_frozen_and_moves(self, clip: tuple[Path, Any]) -> None:
        reward = CLIPScore(folder=str(clip[0])).to("cpu")
        assert not reward.network.training
        assert not any(p.requires_grad for p in reward.network.parameters())
        assert image_embeddings(reward.network, torch.zeros(2, 3, 16, 16)).shape == (2, 6)


class TestPickScore:
    def test_the_models_own_logit(self, clip: tuple[Path, Any]) -> None:
        folder, model = clip
        reward = PickScore(folder=str(folder))
        images, index = pictures(3), torch.tensor([0, 1, 0])
        handle = reward.prepare(REQUESTS)
        found = reward.score(images, handle, index)
        cosine = cosines(model, images)[torch.arange(3), index]
        torch.testing.assert_close(found.value, model.logit_scale.exp().detach() * cosine)
        torch.testing.assert_close(found.parts["cosine"], cosine)
        torch.testing.assert_close(reward.loss(images, handle, index), 30 - found.value)
        assert reward.label == f"PickScore(tensor, float32, weights {reward.fingerprint})"

    def test_the_tokenizer_may_lie_elsewhere(self, clip: tuple[Path, Any], tmp_path: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((clip[0] / name).read_bytes())
        (problem,) = PickScore(folder=str(tmp_path)).check()
        assert "has no tokenizer.json" in problem
        reward = PickScore(folder=str(tmp_path), tokenizer=str(clip[0]))
        assert reward.check() == []
        together = PickScore(folder=str(clip[0]))
        torch.testing.assert_close(reward.prepare(REQUESTS), together.prepare(REQUESTS))

    def test_labels_tell_weights_apart(self, clip: tuple[Path, Any], tmp_path: Path) -> None:
        for file in clip[0].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        one = PickScore(folder=str(clip[0]))
        assert one.label == PickScore(folder=str(tmp_path)).label  # wherever they lie
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        other = PickScore(folder=str(tmp_path))
        assert len(one.fingerprint) == len(other.fingerprint) == 8
        assert one.fingerprint != other.fingerprint
        assert PickScore().label == "PickScore(tensor, float32, weights none)"


# ------------------------------------------------------------------ open_clip

SMALL = OpenCLIPSizes(6, IMAGE_SIZE, 4, (8, 2, 2), (12, 3, 3), 6, len(WORDS))


def open_clip_state(sizes: OpenCLIPSizes, scale: float = 0.4) -> dict[str, Tensor]:
    """Return tensors of the names and shapes that open_clip saves."""
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()}
    side = sizes.image_size // sizes.patch_size
    for prefix, (width, layers, _) in (("visual.", sizes.vision), ("", sizes.text)):
        for i in range(layers):
            stem = f"{prefix}transformer.resblocks.{i}"
            for name, shape in {
                "ln_1": (width,), "ln_2": (width,), "attn.out_proj": (width, width),
                "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width),
            }.items():  # fmt: skip
                shapes |= {f"{stem}.{name}.weight": shape, f"{stem}.{name}.bias": shape[:1]}
            shapes[f"{stem}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{stem}.attn.in_proj_bias"] = (3 * width,)
    vision, text = sizes.vision[0], sizes.text[0]
    shapes |= {
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": (side * side + 1, vision),
        "visual.proj": (vision, sizes.embedding_size),
        "visual.conv1.weight": (vision, 3, sizes.patch_size, sizes.patch_size),
        "token_embedding.weight": (sizes.vocab_size, text),
        "positional_embedding": (sizes.num_tokens, text),
        "text_projection": (text, sizes.embedding_size),
    }
    for name, width in (("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    if vision > 64:
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {n: scale * torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def open_clip_features(
    state: dict[str, Tensor], sizes: OpenCLIPSizes, pixels: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return both unit embeddings as an open_clip model computes them, with torch's attention."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def tower(x: Tensor, prefix: str, shape: tuple[int, int, int], mask: Tensor | None) -> Tensor:
        width, layers, heads = shape
        for i in range(layers):
            stem = f"{prefix}transformer.resblocks.{i}"
            attention = nn.MultiheadAttention(width, heads, batch_first=True)
            start = f"{stem}.attn."
            attention.load_state_dict(
                {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            )
            y = norm(x, f"{stem}.ln_1")
            x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
            y = F.gelu(linear(norm(x, f"{stem}.ln_2"), f"{stem}.mlp.c_fc"))
            x = x + linear(y, f"{stem}.mlp.c_proj")
        return x

    with torch.no_grad():
        x = F.conv2d(pixels, state["visual.conv1.weight"], stride=sizes.patch_size)
        x = x.flatten(2).transpose(1, 2)
        first = state["visual.class_embedding"].expand(len(x), 1, -1)
        x = norm(torch.cat((first, x), 1) + state["visual.positional_embedding"], "visual.ln_pre")
        x = norm(tower(x, "visual.", sizes.vision, None)[:, 0], "visual.ln_post")
        image = x @ state["visual.proj"]
        y = state["token_embedding.weight"][ids] + state["positional_embedding"][: ids.shape[1]]
        future = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
        y = norm(tower(y, "", sizes.text, future), "ln_final")
        text = y[torch.arange(len(y)), ids.argmax(-1)] @ state["text_projection"]
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


class SmallHPS(HPS):
    sizes = SMALL


class TestHPS:
    @pytest.fixture(scope="class")
    def weights(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
        torch.save({"epoch": 1, "state_dict": open_clip_state(SMALL)}, path)
        return str(path)

    def test_the_cosine_of_open_clip(self, clip: tuple[Path, Any], weights: str) -> None:
        reward = SmallHPS(weights=weights, tokenizer=str(clip[0]))
        assert reward.check() == []
        assert reward.label.startswith("SmallHPS(v2.1, tensor, float32, weights ")
        images, index = pictures(4), torch.tensor([0, 1, 1, 0])
        handle = reward.prepare(REQUESTS)
        found = reward.score(images, handle, index).value
        pixels, state = Preprocessing(IMAGE_SIZE)(images), open_clip_state(SMALL)
        for i, prompt in enumerate(index.tolist()):
            ids = torch.tensor([TOKENS[prompt]])
            image, text = open_clip_features(state, SMALL, pixels[i : i + 1], ids)
            assert float(found[i]) == pytest.approx(float((image * text).sum()), abs=1e-5)
        assert found.std() > 1e-3
        torch.testing.assert_close(reward.loss(images, handle, index), 1 - found)
        model = load_open_clip(Path(weights), SMALL)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))

    def test_wide_pictures_get_borders(self, clip: tuple[Path, Any], weights: str) -> None:
        reward = SmallHPS(weights=weights, tokenizer=str(clip[0]))
        wide = torch.zeros(1, 3, 16, 16)
        wide[:, :, 4:12] = pictures(1, side=16)[:, :, 4:12]
        handle, index = reward.prepare(REQUESTS), torch.tensor([0])
        values = [
            reward.score(each, handle, index).value for each in (wide, wide[:, :, 4:12].clone())
        ]
        torch.testing.assert_close(values[0], values[1])

    def test_the_published_sizes_load(self) -> None:
        pytest.importorskip("transformers")
        with torch.device("meta"):
            own = build_clip(VIT_H_14).state_dict()
        found = from_open_clip(open_clip_state(VIT_H_14) | {"attn_mask": torch.empty(77, 77)})
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}
        assert sum(tensor.numel() for tensor in found.values()) == 986_109_441  # as published

    def test_weights_that_do_not_fit(self, clip: tuple[Path, Any], tmp_path: Path) -> None:
        path = tmp_path / "weights.pt"
        state = open_clip_state(SMALL)
        cases: list[tuple[dict[str, Any], str]] = [
            ({k: v for k, v in state.items() if k != "visual.proj"}, "1 missing, 0 unexpected"),
            (open_clip_state(replace(SMALL, embedding_size=5)), "have another shape than CLIP"),
            (state | {"new.weight": torch.ones(1)}, r"1 unexpected keys .* \(first: new.weight\)"),
        ]
        for content, message in cases:
            torch.save({"state_dict": content}, path)
            reward = SmallHPS(weights=str(path), tokenizer=str(clip[0]))
            with pytest.raises(CheckpointError, match=message):
                reward.prepare(REQUESTS)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(CheckpointError, match="is damaged or no weight file"):
            SmallHPS(weights=str(path), tokenizer=str(clip[0])).prepare(REQUESTS)


# ------------------------------------------------------------------ what is missing


def test_what_to_download_is_told(tmp_path: Path) -> None:
    for reward, words in (
        (CLIPScore(), "openai/clip-vit-large-patch14 (MIT)"),
        (PickScore(), "yuvalkirstain/PickScore_v1, MIT"),
        (HPS(), "HPS_v2.1_compressed.pt (xswu/HPSv2, Apache-2.0) is needed"),
        (HPS(version="2.0"), "HPS_v2_compressed.pt (xswu/HPSv2, Apache-2.0) is needed"),
    ):
        (problem,) = reward.check()
        assert words in problem
        assert problem.endswith(">.")
        assert reward.licence
        assert reward.problems([Request(label=3)])  # they read captions
    (problem,) = HPS(weights=str(tmp_path / "none.pt")).check()
    assert "none.pt does not exist" in problem
    (tmp_path / "there.pt").touch()
    assert find_file(str(tmp_path / "there.pt"), "a file") == tmp_path / "there.pt"
    (problem,) = HPS(weights=str(tmp_path / "there.pt")).check()
    assert problem.startswith("reward.tokenizer is not set, and the tokenizer of a CLIP model")


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward\.scale must be one of .*Did you mean 'hessel'"):
        CLIPScore(scale="hesel")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"reward\.precision must be one of float32, bfloat16"):
        PickScore(precision="float64")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"reward\.version must be one of 2\.0, 2\.1"):
        HPS(version="3")  # type: ignore[arg-type]


def test_damaged_folders_are_told_of(clip: tuple[Path, Any], tmp_path: Path) -> None:
    for file in clip[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"weights of reward\.folder=.* cannot be loaded"):
        CLIPScore(folder=str(tmp_path)).prepare(REQUESTS)
    with pytest.raises(ConfigError, match="a request has none"):
        CLIPScore(folder=str(clip[0])).prepare([Request(label=1)])
