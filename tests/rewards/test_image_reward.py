"""ImageReward: our BLIP against torch's layers and transformers' classes, on small networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genscale.conditioning.bert import BertAttention
from genscale.errors import CheckpointError, ConfigError
from genscale.rewards.base import Request
from genscale.rewards.blip import (
    BLIP,
    BLIP_LARGE,
    BLIPSizes,
    GroundedLayer,
    GroundedText,
    VisionBlock,
    VisionEncoder,
    from_blip,
)
from genscale.rewards.image_reward import ImageReward, Tokens
from genscale.rewards.preprocessing import Preprocessing
from tests.rewards.small_clip import pictures
from tests.rewards.test_aesthetic import by_hand, head_state

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "circle", "two", "##s")
SMALL = BLIPSizes(16, 4, (12, 2, 3), (8, 2, 2), len(WORDS), 40)
REQUESTS = [Request("Two red circles"), Request("blue")]
IDS = ([2, 7, 4, 6, 8, 3], [2, 5, 3])  # of the captions


def blip_state(sizes: BLIPSizes, prefix: str = "") -> dict[str, Tensor]:
    """Return tensors of the names and shapes of a published BLIP; large ones without numbers."""
    (wide, deep, _), (narrow, layers, _) = sizes.vision, sizes.text
    places = (sizes.image_size // sizes.patch_size) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, wide),
        "visual_encoder.pos_embed": (1, places, wide),
        "visual_encoder.patch_embed.proj.weight": (wide, 3, sizes.patch_size, sizes.patch_size),
        "visual_encoder.patch_embed.proj.bias": (wide,),
        "text_encoder.embeddings.position_ids": (1, sizes.max_tokens),
        "text_encoder.embeddings.word_embeddings.weight": (sizes.vocab_size, narrow),
        "text_encoder.embeddings.position_embeddings.weight": (sizes.max_tokens, narrow),
        "vision_proj.weight": (4, wide),
        "vision_proj.bias": (4,),
        "text_proj.weight": (4, narrow),
        "text_proj.bias": (4,),
    }
    linear: dict[str, tuple[int, int]] = {}
    norms = {"visual_encoder.norm": wide, "text_encoder.embeddings.LayerNorm": narrow}
    for i in range(deep):
        stem = f"visual_encoder.blocks.{i}"
        linear |= {
            f"{stem}.attn.qkv": (3 * wide, wide), f"{stem}.attn.proj": (wide, wide),
            f"{stem}.mlp.fc1": (4 * wide, wide), f"{stem}.mlp.fc2": (wide, 4 * wide),
        }  # fmt: skip
        norms |= {f"{stem}.norm1": wide, f"{stem}.norm2": wide}
    for i in range(layers):
        stem = f"text_encoder.encoder.layer.{i}"
        for kind, context in (("attention", narrow), ("crossattention", wide)):
            for name, width in (("query", narrow), ("key", context), ("value", context)):
                linear[f"{stem}.{kind}.self.{name}"] = (narrow, width)
            linear[f"{stem}.{kind}.output.dense"] = (narrow, narrow)
            norms[f"{stem}.{kind}.output.LayerNorm"] = narrow
        linear[f"{stem}.intermediate.dense"] = (4 * narrow, narrow)
        linear[f"{stem}.output.dense"] = (narrow, 4 * narrow)
        norms[f"{stem}.output.LayerNorm"] = narrow
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    if wide > 64:
        return {prefix + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in shapes.items():
        value = 0.4 * torch.randn(shape, generator=generator)
        state[prefix + name] = 1 + value if name.rpartition(".")[0] in norms else value
    return state


class SmallImageReward(ImageReward):
    sizes = SMALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("image_reward")
    torch.save(blip_state(SMALL, "blip.") | head_state(8, "mlp."), place / "ImageReward.pt")
    (place / "vocab.txt").write_text("\n".join(WORDS))
    return place


def reward_in(folder: Path, **changes: Any) -> SmallImageReward:
    settings = {"weights": str(folder / "ImageReward.pt"), "vocabulary": str(folder)}
    return SmallImageReward(**{**settings, **changes})


class TestNetwork:
    def test_a_layer_is_torchs_decoder_layer(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ours = GroundedLayer(8, 2, 8)
            x, picture = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
            # attention, norm; attention to the memory, norm; feed-forward, norm
            theirs = nn.TransformerDecoderLayer(
                8, 2, 32, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
            )
        pairs: tuple[tuple[BertAttention, Any], ...] = (
            (ours, theirs.self_attn),
            (ours.cross, theirs.multihead_attn),
        )
        with torch.no_grad():
            for own, attention in pairs:
                three = (own.q, own.k, own.v)
                attention.in_proj_weight.copy_(torch.cat([each.weight for each in three]))
                attention.in_proj_bias.copy_(torch.cat([each.bias for each in three]))
                attention.out_proj.load_state_dict(own.out.state_dict())
        theirs.linear1.load_state_dict(ours.up.state_dict())
        theirs.linear2.load_state_dict(ours.down.state_dict())
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
        expected = theirs(x, picture, tgt_key_padding_mask=~mask)
        torch.testing.assert_close(ours(x, picture, mask), expected, rtol=0, atol=1e-5)

    def test_a_block_of_the_vit_is_torchs_encoder_layer(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ours, x = VisionBlock(12, 3), torch.randn(2, 5, 12)
            theirs: Any = nn.TransformerEncoderLayer(
                12, 3, 48, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
            )
        with torch.no_grad():
            theirs.self_attn.in_proj_weight.copy_(ours.attn.qkv.weight)
            theirs.self_attn.in_proj_bias.copy_(ours.attn.qkv.bias)
        theirs.self_attn.out_proj.load_state_dict(ours.attn.out.state_dict())
        theirs.linear1.load_state_dict(ours.mlp.up.state_dict())
        theirs.linear2.load_state_dict(ours.mlp.down.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)

    def test_the_whole_is_that_of_transformers(self) -> None:
        transformers = pytest.importorskip("transformers")
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        state = blip_state(SMALL)
        ours = BLIP(SMALL)
        ours.load_state_dict(from_blip(state))
        assert isinstance(ours.vision, VisionEncoder)
        assert isinstance(ours.text, GroundedText)
        vision = transformers.BlipVisionModel(
            transformers.BlipVisionConfig(
                hidden_size=12, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3,
                image_size=16, patch_size=4, layer_norm_eps=1e-6,
            )
        )  # fmt: skip
        names = {
            "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
            "patch_embed.proj": "embeddings.patch_embedding", "blocks": "encoder.layers",
            "attn.": "self_attn.", "self_attn.proj.": "self_attn.projection.",
            "norm1": "layer_norm1", "norm2": "layer_norm2",
        }  # fmt: skip
        renamed = {}
        for key, value in state.items():
            if key.startswith("visual_encoder."):
                key = key.removeprefix("visual_encoder.")
                key = f"post_layernorm.{key[5:]}" if key.startswith("norm.") else key
                for theirs, own in names.items():
                    key = key.replace(theirs, own)
                renamed[key] = value
        vision.load_state_dict(renamed)
        text = BlipTextModel(
            transformers.BlipTextConfig(
                vocab_size=SMALL.vocab_size, hidden_size=8, encoder_hidden_size=12,
                intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=SMALL.max_tokens, is_decoder=True, hidden_act="gelu",
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        start = "text_encoder."
        text.load_state_dict(
            {
                k.removeprefix(start): v
                for k, v in state.items()
                if k.startswith(start) and "position_ids" not in k
            }
        )
        pixels = Preprocessing(16)(pictures(2))
        ids, mask = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.bool)
        for i, numbers in enumerate(IDS):
            ids[i, : len(numbers)], mask[i, : len(numbers)] = torch.tensor(numbers), True
        with torch.no_grad():
            seen = vision.eval()(pixel_values=pixels).last_hidden_state
            out = text.eval()(
                input_ids=ids, attention_mask=mask.long(), encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.int64),
            )  # fmt: skip
            found = ours(pixels, ids, mask)
        torch.testing.assert_close(ours.vision(pixels), seen, rtol=0, atol=1e-5)
        torch.testing.assert_close(found, out.last_hidden_state[:, 0], rtol=0, atol=1e-5)

    def test_the_published_sizes_load(self) -> None:
        with torch.device("meta"):
            own = BLIP(BLIP_LARGE).state_dict()
        found = from_blip(blip_state(BLIP_LARGE))
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}
        vision = sum(value.numel() for key, value in found.items() if key.startswith("vision."))
        assert vision == 303_301_632  # ViT-L/16 at 224 without its classifier


class TestImageReward:
    @pytest.mark.parametrize("exact", [False, True])
    def test_the_standardised_score(self, folder: Path, exact: bool) -> None:
        reward = reward_in(folder, exact=exact)
        assert reward.check() == []
        network = BLIP(SMALL)
        network.load_state_dict(from_blip(blip_state(SMALL)))
        images, index = pictures(3), torch.tensor([0, 1, 0])
        found = reward.score(images, reward.prepare(REQUESTS), index)
        pixels = Preprocessing(16, exact=exact)(images)
        for i, prompt in enumerate(index.tolist()):
            ids = torch.tensor([IDS[prompt]])
            with torch.no_grad():
                state = network(pixels[i : i + 1], ids, torch.ones_like(ids).bool())
            raw = float(by_hand(state, head_state(8)))
            assert float(found.parts["raw"][i]) == pytest.approx(raw, abs=1e-5)
            expected = (raw - 0.16717362830052426) / 1.0333394966054072
            assert float(found.value[i]) == pytest.approx(expected, abs=1e-5)
        assert found.value.std() > 1e-3
        route = "pil" if exact else "tensor"
        assert reward.label.startswith(f"SmallImageReward({route}, float32, weights ")

    def test_captions_are_word_pieces_and_are_cut(self, folder: Path) -> None:
        handle = reward_in(folder).prepare([*REQUESTS, Request("red " * 50)])
        assert isinstance(handle, Tokens)
        assert handle.mask.sum(1).tolist() == [6, 3, 35]
        assert [row[m].tolist() for row, m in zip(handle.ids, handle.mask, strict=True)][:2] == [
            *IDS
        ]
        assert handle.ids[2].tolist() == [2, *[4] * 33, 3]

    def test_batch_mates_do_not_matter(self, folder: Path) -> None:
        reward, images, index = reward_in(folder), pictures(4), torch.tensor([0, 1, 1, 0])
        together = reward.score(images, reward.prepare(REQUESTS), index).value
        for i in range(4):
            alone = reward.prepare([REQUESTS[int(index[i])]])
            value = reward.score(images[i : i + 1], alone, torch.tensor([0])).value
            torch.testing.assert_close(value[0], together[i], rtol=0, atol=1e-5)

    def test_the_gradient_agrees_with_finite_differences(self, folder: Path) -> None:
        reward, images, index = reward_in(folder), pictures(1), torch.tensor([0])
        handle = reward.prepare(REQUESTS[:1])
        wanted = images.clone().requires_grad_()
        loss = reward.loss(wanted, handle, index)
        (gradient,) = torch.autograd.grad(loss.sum(), wanted)
        value = float(reward.score(images, handle, index).value)
        assert float(loss.detach()) == pytest.approx(2 - value, abs=1e-5)
        direction, step = gradient / gradient.norm(), 1e-2
        ends = [
            float(reward.loss(images + sign * step * direction, handle, index)) for sign in (1, -1)
        ]
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=2e-2)

    def test_the_exact_route_comes_close_and_has_no_gradient(self, folder: Path) -> None:
        images, index = pictures(4), torch.zeros(4, dtype=torch.int64)
        exact = reward_in(folder, exact=True)
        values = [
            each.score(images, each.prepare(REQUESTS), index).value
            for each in (reward_in(folder), exact)
        ]
        assert 0 < (values[0] - values[1]).abs().max() < 2e-2
        with pytest.raises(NotImplementedError, match="has no gradient"):
            exact.loss(images, exact.prepare(REQUESTS), index)

    def test_half_precision_gives_float32_values(self, folder: Path) -> None:
        images, index = pictures(2), torch.tensor([0, 1])
        full, half = reward_in(folder), reward_in(folder, precision="bfloat16")
        one, other = (
            each.score(images, each.prepare(REQUESTS), index).value for each in (full, half)
        )
        assert other.dtype == torch.float32
        assert 0 < (one - other).abs().max() < 0.1

    def test_weights_that_do_not_fit_are_told_of(self, folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "weights.pt"
        state = blip_state(SMALL, "blip.") | head_state(8, "mlp.")
        image, index = pictures(1), torch.tensor([0])
        cases = (
            ({k: v for k, v in state.items() if "cls_token" not in k}, "1 missing, 0 unexpected"),
            (state | {"other": torch.ones(1)}, r"1 unexpected .* \(first: other\)"),
            (
                blip_state(replace(SMALL, patch_size=8), "blip.") | head_state(8, "mlp."),
                r"have another shape .* Give ImageReward\.pt",
            ),
        )
        for content, message in cases:
            torch.save(content, path)
            reward = reward_in(folder, weights=str(path))
            with pytest.raises(CheckpointError, match=message):
                reward.score(image, reward.prepare(REQUESTS), index)
        path.write_bytes(path.read_bytes()[:999])
        with pytest.raises(CheckpointError, match="is damaged or no weight file"):
            reward_in(folder, weights=str(path)).load()

    def test_what_to_download_is_told(self, folder: Path, tmp_path: Path) -> None:
        (problem,) = ImageReward().check()
        assert "ImageReward.pt (THUDM/ImageReward, Apache-2.0) is needed" in problem
        (problem,) = reward_in(folder, vocabulary=None).check()
        assert "reward.vocabulary is not set, and vocab.txt" in problem
        (problem,) = reward_in(folder, vocabulary=str(tmp_path)).check()
        assert "holds no vocabulary" in problem
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match="is damaged"):
            reward_in(folder, vocabulary=str(tmp_path)).prepare(REQUESTS)
        with pytest.raises(ConfigError, match="a request has none"):
            reward_in(folder).prepare([Request(label=0)])
