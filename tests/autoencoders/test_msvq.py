"""The multi-scale tokenizer: pictures to tokens and back, and folders of trained ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from genscale.autoencoders.base import ScaleTokenizer, weights_digest
from genscale.autoencoders.diffusers_folder import WEIGHTS, Source, load_as
from genscale.autoencoders.identity import Identity
from genscale.autoencoders.msvq import MSVQ, TrainedMSVQ, load_msvq
from genscale.autoencoders.msvq_folder import holds_tokenizer, locate_tokenizer, read_settings
from genscale.autoencoders.vq_layers import (
    Decoder,
    Downsample,
    Encoder,
    Level,
    LevelSettings,
    Middle,
    ResidualBlock,
    SpatialAttention,
    Upsample,
)
from genscale.cli.autoencoding import size_problems, token_problems
from genscale.cli.resolvers import register_resolvers, tokenizer
from genscale.errors import CheckpointError, ConfigError
from genscale.rng import key, normal

# 16 pixels -> 4 x 4 cells of 8 channels, grey
TINY: dict[str, Any] = {
    "scales": [1, 2, 4],
    "vocab_size": 128,
    "latent_channels": 8,
    "image_channels": 1,
    "hidden_size": 8,
    "channel_multipliers": [1, 2, 2],
    "num_blocks": 1,
    "norm_groups": 4,
}
IMAGES = normal(key(0, torch.arange(3)), (1, 16, 16)).clamp(-1, 1)


def tiny(**changes: Any) -> MSVQ:
    torch.manual_seed(0)
    model = MSVQ(**{**TINY, **changes}).eval()
    with torch.no_grad():
        model.quantizer.embedding.weight.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> MSVQ:
    return tiny().requires_grad_(False)


@pytest.fixture
def folder(model: MSVQ, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


class TestLayers:
    SETTINGS = LevelSettings((8, 16), 2, (1,), True, 4, 0.0)

    def test_halves_mirror_each_other(self) -> None:
        encoder, decoder = Encoder(3, 5, self.SETTINGS), Decoder(5, 3, self.SETTINGS)
        assert decoder(encoder(torch.zeros(2, 3, 8, 12))).shape == (2, 3, 8, 12)
        assert [len(level.blocks) for level in encoder.levels] == [2, 2]
        assert [len(level.blocks) for level in decoder.levels] == [3, 3]
        kinds = [[type(x) for x in half.levels[0].attentions] for half in (encoder, decoder)]
        assert kinds == [[torch.nn.Identity] * 2, [SpatialAttention] * 3]  # the coarse one attends
        assert isinstance(encoder.levels[0], Level)
        assert isinstance(encoder.middle, Middle)

    def test_downsampling_pads_on_the_right_and_at_the_bottom_alone(self) -> None:
        down = Downsample(1)
        with torch.no_grad():
            down.conv.weight.zero_()[0, 0, 0, 0] = 1.0  # reads the cell itself
            down.conv.bias.zero_()
        x = torch.arange(16.0).view(1, 1, 4, 4)
        assert torch.equal(down(x), x[..., ::2, ::2])
        with torch.no_grad():
            down.conv.weight.zero_()[0, 0, 2, 2] = 1.0  # reads two further on
        assert down(x)[0, 0].tolist() == [[10.0, 0.0], [0.0, 0.0]]

    def test_upsampling_repeats_cells(self) -> None:
        up = Upsample(1)
        with torch.no_grad():
            up.conv.weight.zero_()[0, 0, 1, 1] = 1.0
            up.conv.bias.zero_()
        assert up(torch.tensor([[[[1.0, 2.0]]]]))[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]

    def test_attention_is_of_one_head_over_all_cells(self) -> None:
        attention, x = SpatialAttention(8, 4), torch.randn(2, 8, 3, 5)
        q, k, v = attention.qkv(attention.norm(x)).flatten(2).chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k * 8**-0.5).softmax(-1)
        y = (v @ weights.transpose(1, 2)).view(x.shape)
        torch.testing.assert_close(attention(x), x + attention.out(y))

    def test_widths_that_change_need_a_shortcut(self) -> None:
        assert ResidualBlock(8, 8, 4, 0.0).shortcut is None
        block, x = ResidualBlock(8, 16, 4, 0.0), torch.randn(1, 8, 4, 4)
        with torch.no_grad():
            block.conv_2.weight.zero_()
            block.conv_2.bias.zero_()
        assert torch.equal(block(x), block.shortcut(x))


class TestMSVQ:
    def test_the_published_layout(self) -> None:
        with torch.device("meta"):
            made = MSVQ()
        # the official program's own count: 324 tensors, of which one counts the codes' use
        assert len(made.state_dict()) == 324
        assert made.num_parameters_by_block() == {
            "encoder": 44_107_872,
            "quant_conv": 9_248,
            "quantizer": 168_064,
            "post_quant_conv": 9_248,
            "decoder": 64_653_923,
        }
        assert sum(p.numel() for p in made.parameters()) == 108_948_355
        assert (made.downsample, made.sample_shape, made.num_tokens) == (16, (3, 256, 256), 680)

    def test_operations_of_the_published_one(self) -> None:
        """As measured on the official program at 256 pixels: 215 and 393 GFLOP."""
        with torch.device("meta"):
            made = MSVQ().requires_grad_(False)
            calls = {made.encode_features: (1, 3, 256, 256), made.decode: (1, 32, 16, 16)}
            counts = []
            for call, shape in calls.items():
                with FlopCounterMode(display=False) as counter:
                    call(torch.empty(shape))
                counts.append(counter.get_total_flops() // 10**9)
        assert counts == [215, 393]

    def test_a_tiny_one_for_a_cpu(self, model: MSVQ) -> None:
        assert isinstance(model, ScaleTokenizer)
        assert (model.vocab_size, model.latent_channels, model.image_channels) == (128, 8, 1)
        assert (model.downsample, model.sample_shape) == (4, (1, 16, 16))
        assert model.scales == ((1, 1), (2, 2), (4, 4))
        tokens = model.tokens(IMAGES)
        assert (tokens.shape, tokens.dtype) == ((3, 21), torch.int64)
        assert model.decode(model.latent(tokens)).shape == IMAGES.shape

    def test_encoding_is_the_latent_of_the_tokens(self, model: MSVQ) -> None:
        tokens = model.tokens(IMAGES)
        snapshots = model.snapshots(tokens)
        assert torch.equal(model.encode(IMAGES), snapshots[-1])
        assert torch.equal(model.latent(tokens), snapshots[-1])

    def test_scale_by_scale_is_all_at_once(self, model: MSVQ) -> None:
        tokens = model.tokens(IMAGES)
        features = model.features(tokens)
        running, seen = torch.zeros(3, 8, 4, 4), [torch.zeros(3, 1, 8)]
        for scale, part in enumerate(tokens.split([1, 4, 16], dim=1)):
            running, following = model.add_scale(running, model.codes(part), scale)
            seen += [] if following is None else [following]
        assert torch.equal(features, torch.cat(seen, dim=1))
        assert torch.equal(running, model.latent(tokens))

    def test_the_training_pass_is_the_same_picture(self, model: MSVQ) -> None:
        again, quantized = model(IMAGES)
        torch.testing.assert_close(again, model.decode(model.encode(IMAGES)))
        assert torch.equal(quantized.tokens, model.tokens(IMAGES))
        parts = model.quantize(model.encode_features(IMAGES))
        assert torch.equal(parts.losses, quantized.losses)
        assert parts.losses.shape == (3,)

    def test_everything_learns(self) -> None:
        made = tiny()
        again, quantized = made(IMAGES)
        (again.square().mean() + quantized.losses.mean()).backward()
        # with three scales the second of four phi layers is nobody's
        idle = {name for name, p in made.named_parameters() if p.grad is None}
        assert idle == {"quantizer.phis.1.weight", "quantizer.phis.1.bias"}

    def test_what_makes_tokens_is_float32_whatever_the_autocast(self, model: MSVQ) -> None:
        def outputs() -> list[Tensor]:
            tokens = model.tokens(IMAGES)
            running, following = model.add_scale(
                torch.zeros(3, 8, 4, 4), model.codes(tokens[:, :1]), 0
            )
            assert following is not None
            quantized = model.quantize(model.encode_features(IMAGES))
            features = model.features(tokens)
            return [tokens, running, following, features, quantized.latent, quantized.losses]

        expected, latent = outputs(), model.latent(model.tokens(IMAGES))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for got, wanted in zip(outputs(), expected, strict=True):
                assert torch.equal(got, wanted)
            assert model.decode(latent).dtype == torch.bfloat16

    def test_saved_and_loaded(self, model: MSVQ, folder: Path) -> None:
        again = MSVQ.from_pretrained(folder)
        assert torch.equal(again.encode(IMAGES), model.encode(IMAGES))
        assert again.config["attention_levels"] is None

    def test_weights_are_a_function_of_the_seed(self) -> None:
        made = tiny()
        states = []
        for _ in range(2):
            torch.manual_seed(3)
            made.reset_parameters()
            states.append({name: value.clone() for name, value in made.state_dict().items()})
        assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
        bias = made.encoder.conv_in.bias
        assert bias is not None
        assert bias.abs().max() > 0

    def test_levels_may_attend_or_not(self) -> None:
        made = tiny(attention_levels=[0], middle_attention=False)
        names = [name for name in made.state_dict() if name.endswith(".qkv.weight")]
        assert names == ["encoder.levels.0.attentions.0.qkv.weight"] + [
            f"decoder.levels.2.attentions.{i}.qkv.weight" for i in range(2)
        ]

    def test_other_scales_for_another_resolution(self) -> None:
        made = tiny().requires_grad_(False)
        made.use_scales([1, 2, 3, [4, 6]])
        assert made.sample_shape == (1, 16, 24)
        tokens = made.tokens(torch.zeros(2, 1, 16, 24))
        assert tokens.shape == (2, 1 + 4 + 9 + 24)

    def test_pictures_that_do_not_fit_are_refused(self, model: MSVQ) -> None:
        with pytest.raises(ConfigError, match=r"encodes pictures of 1 channel.* have 3. Give data"):
            model.tokens(torch.zeros(1, 3, 16, 16))
        with pytest.raises(ConfigError, match=r"18 x 16 do not divide by autoencoder.downsample=4"):
            model.check_pictures(torch.zeros(1, 1, 18, 16))
        sentence = (
            r"24 x 24 have latents of 6 x 6, but the last of the scales is 4 x 4. "
            r"Give pictures of 16 x 16, or scales that end with \[6, 6\]"
        )
        with pytest.raises(ConfigError, match=sentence):
            model.tokens(torch.zeros(1, 1, 24, 24))
        with pytest.raises(ConfigError, match=sentence):
            model(torch.zeros(1, 1, 24, 24))

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"norm_groups": 3}, "norm_groups=3 does not divide a width of 8"),
            ({"attention_levels": [3]}, "names level 3, but levels are 0 to 2"),
            ({"latent_kernel": 2}, "latent_kernel must be odd"),
            ({"num_blocks": 0}, r"the widths are \[8, 16, 16\] with 0 blocks"),
        ],
    )
    def test_settings_that_do_not_fit_are_refused(
        self, changes: dict[str, Any], sentence: str
    ) -> None:
        with pytest.raises(ConfigError, match=sentence):
            tiny(**changes)


class TestTrainedMSVQ:
    def test_a_trained_one_does_what_the_model_does(self, model: MSVQ, folder: Path) -> None:
        trained = TrainedMSVQ(run=str(folder))
        tokens = model.tokens(IMAGES)
        assert torch.equal(trained.tokens(IMAGES), tokens)
        assert torch.equal(trained.features(tokens), model.features(tokens))
        assert torch.equal(trained.encode(IMAGES), model.encode(IMAGES))
        assert torch.equal(trained.latent(tokens), model.latent(tokens))
        assert torch.equal(
            trained.decode(model.latent(tokens)), model.decode(trained.encode(IMAGES))
        )
        running, following = trained.add_scale(
            torch.zeros(3, 8, 4, 4), trained.codes(tokens[:, :1]), 0
        )
        assert torch.equal(running, model.snapshots(tokens)[0])
        assert torch.equal(following, model.features(tokens)[:, 1:5])

    def test_weights_wait_until_they_are_needed_and_are_frozen(self, folder: Path) -> None:
        with torch.device("meta"):
            trained = TrainedMSVQ(run=str(folder))
        assert list(trained.parameters()) == []
        assert trained.check(encodes=True, decodes=True) == []
        before = torch.get_rng_state()
        trained.encode(IMAGES)
        assert torch.equal(torch.get_rng_state(), before)
        assert not any(parameter.requires_grad for parameter in trained.parameters())
        assert not any(part.training for part in load_msvq(str(folder)).modules())

    @pytest.mark.parametrize("inside", [".", "model", "export", "export/model"])
    def test_runs_and_exported_folders_are_found(
        self, model: MSVQ, tmp_path: Path, inside: str
    ) -> None:
        model.save_pretrained(tmp_path / "run" / inside)
        assert locate_tokenizer(str(tmp_path / "run")).samefile(tmp_path / "run" / inside)
        settings = {"scales": [1, 2, 4], "vocab_size": 128, "latent_channels": 8}
        settings |= {"downsample": 4, "image_channels": 1}
        assert read_settings(str(tmp_path / "run")) == settings
        assert holds_tokenizer(str(tmp_path / "run"))
        assert not holds_tokenizer(str(tmp_path))

    def test_without_one_it_is_told_how_to_train_it(self) -> None:
        stated = TrainedMSVQ(scales=[1, 2], vocab_size=4, latent_channels=2, downsample=4)
        assert stated.image_channels is None
        how = r"autoencoder.run is not set, .* with: python train.py model=msvq data=<data>"
        for needs in ({"encodes": True, "decodes": False}, {"encodes": False, "decodes": True}):
            (sentence,) = stated.check(**needs)
            assert sentence.startswith("autoencoder.run is not set")
            assert "Train one with: python train.py model=msvq data=<data>" in sentence
        assert stated.check(encodes=False, decodes=False) == []
        with pytest.raises(ConfigError, match=how):
            stated.encode(IMAGES)
        with pytest.raises(ConfigError, match=how):
            TrainedMSVQ(vocab_size=4)

    def test_folders_of_something_else_are_refused(self, folder: Path, tmp_path: Path) -> None:
        def problem(run: Path) -> str:
            stated = TrainedMSVQ(
                run=str(run), scales=[1], vocab_size=2, latent_channels=2, downsample=1,
                image_channels=1,
            )  # fmt: skip
            (sentence,) = stated.check(encodes=True, decodes=True)
            return sentence

        assert "gone is no folder. Give that of a tokenizer" in problem(tmp_path / "gone")
        empty = tmp_path / "empty"
        empty.mkdir()
        assert "empty holds no tokenizer: config.json and" in problem(empty)
        (empty / "config.yaml").write_text("name: x")
        assert "is a run without an export/ folder" in problem(empty)
        (folder / WEIGHTS[0]).rename(folder / "elsewhere.safetensors")
        assert f"holds a config.json and no {WEIGHTS[0]}" in problem(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "_class_name": "DiT"}))
        assert "describes DiT, but an MSVQ was expected" in problem(folder)

    def test_a_config_that_does_not_tell_enough_is_refused(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config["vocab_size"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="does not say vocab_size"):
            TrainedMSVQ(run=str(folder))

    def test_damaged_weights_are_refused(self, folder: Path) -> None:
        weights = load_file(folder / WEIGHTS[0])
        weights.pop("quant_conv.bias")
        save_file(weights, folder / WEIGHTS[0])
        with pytest.raises(CheckpointError, match=r"1 missing, 0 unexpected .*quant_conv.bias"):
            TrainedMSVQ(run=str(folder)).tokens(IMAGES)
        with pytest.raises(CheckpointError, match="1 missing"):
            load_as(MSVQ, folder, Source("autoencoder.run", str(folder)))

    @pytest.mark.parametrize(
        ("name", "given", "own"),
        [("vocab_size", 64, 128), ("latent_channels", 4, 8), ("downsample", 8, 4)],
    )
    def test_another_tokenizer_than_stated_is_refused(
        self, folder: Path, name: str, given: int, own: int
    ) -> None:
        trained = TrainedMSVQ(run=str(folder), **{name: given})
        sentence = (
            f"autoencoder.{name}={given} was given, but .* has {own}. Give autoencoder.{name}"
        )
        (problem,) = trained.check(encodes=False, decodes=False)
        with pytest.raises(ConfigError, match=sentence):
            raise ConfigError(problem)
        with pytest.raises(ConfigError, match=sentence):
            trained.tokens(IMAGES)

    def test_other_scales_must_end_with_the_latents_size(self, folder: Path) -> None:
        trained = TrainedMSVQ(run=str(folder), scales=[1, 2, 3, 6])
        assert trained.tokens(torch.zeros(1, 1, 24, 24)).shape == (1, 50)
        with pytest.raises(ConfigError, match=r"have latents of 4 x 4, but the last .* is 6 x 6"):
            trained.tokens(IMAGES)

    def test_a_link_is_refused_where_it_is_written_down(self, folder: Path) -> None:
        link = folder.parent / "latest"
        link.symlink_to(folder)
        trained = TrainedMSVQ(run=str(link))
        (problem,) = trained.check(encodes=True, decodes=True)
        assert problem.endswith(f"Give what it points to: autoencoder.run={folder.resolve()}")
        assert trained.check(encodes=False, decodes=True) == []

    def test_the_protocol_names_what_decodes(self, model: MSVQ, folder: Path) -> None:
        name = TrainedMSVQ(run=str(folder)).protocol_name
        parts = ("quantizer.embedding.", "quantizer.phis.", "post_quant_conv.", "decoder.")
        assert name == f"msvq:{weights_digest(model, parts)[:8]}"
        weights = load_file(folder / WEIGHTS[0])
        weights["decoder.conv_out.bias"] += 1.0
        save_file(weights, folder / WEIGHTS[0])
        assert TrainedMSVQ(run=str(folder)).protocol_name != name

    def test_configs_read_what_a_network_must_know(self, folder: Path) -> None:
        assert tokenizer(None, "vocab_size", 5) == 5
        assert tokenizer(str(folder / "gone"), "vocab_size", 5) == 5  # the check tells
        assert tokenizer(str(folder), "vocab_size", 5) == 128
        register_resolvers()
        node = OmegaConf.create(
            {
                "autoencoder": {"run": None, "scales": "${tokenizer:${.run},scales,[1,3]}"},
                "model": {"scales": "${autoencoder.scales}"},
            }
        )
        assert list(node.model.scales) == [1, 3]
        node.autoencoder.run = str(folder)
        assert list(node.model.scales) == [1, 2, 4]

    def test_data_of_another_size_are_refused_before_a_run(self, folder: Path) -> None:
        trained = TrainedMSVQ(run=str(folder))
        assert size_problems(trained, 16) == []
        assert size_problems(Identity(latent_channels=3), 24) == []
        (sentence,) = size_problems(trained, 24)
        assert sentence.startswith("data.resolution=24, but the tokenizer's scales end with [4, 4]")
        assert "for pictures of 16 x 16" in sentence

    def test_a_model_of_other_tokens_is_refused_before_a_run(self, folder: Path) -> None:
        trained = TrainedMSVQ(run=str(folder))
        own = {
            "scales": [1, [2, 2], 4],
            "vocab_size": 128,
            "latent_channels": trained.latent_channels,
        }
        assert token_problems(OmegaConf.create(own), trained) == []
        assert token_problems(OmegaConf.create({"depth": 3}), trained) == []
        (sentence,) = token_problems(OmegaConf.create({**own, "vocab_size": 64}), trained)
        assert sentence.startswith("model.vocab_size is 64, but the tokenizer has 128.")
        assert len(token_problems(OmegaConf.create({**own, "scales": [1, 4]}), trained)) == 1

    def test_pixels_are_no_tokens(self) -> None:
        assert not isinstance(Identity(latent_channels=3), ScaleTokenizer)
