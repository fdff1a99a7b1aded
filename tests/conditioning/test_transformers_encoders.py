"""CLIP pair and T5 through transformers, with small networks of random weights in local folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genscale.conditioning.clip_pair import CLIPPair
from genscale.conditioning.t5 import T5
from genscale.conditioning.transformers_folder import (
    Folder,
    check_precision,
    check_transformers,
    load_model,
    load_tokenizer,
)
from genscale.errors import CheckpointError, ConfigError

WORDS = ["<pad>", "<unk>", "<begin>", "<end>", "red", "blue", "circle", "two"]


def test_folders_that_are_not_there_are_told_of(tmp_path: Path) -> None:
    (problem,) = CLIPPair().check()
    assert "text_encoder.source is not set" in problem
    (problem,) = T5(source=str(tmp_path)).check()
    assert f"text_encoder.source={tmp_path} has no config.json and no model.safetensors" in problem
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text("{")
    (problem,) = CLIPPair(source=str(tmp_path), second_source=str(tmp_path)).check()
    assert "config.json is damaged" in problem


def test_sizes_and_precision_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"text_encoder\.precision must be one of float32"):
        check_precision("float16")
    with pytest.raises(ConfigError, match=r"text_encoder\.pooled_size=8 must be"):
        T5(pooled_size=8)


def test_the_text_part_of_a_whole_model_is_read(tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    config = {"model_type": "clip", "text_config": {"hidden_size": 24}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = Folder("text_encoder.source", str(tmp_path), "a CLIP text model")
    assert folder.config()["hidden_size"] == 24
    before = folder.digest()
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert folder.digest() != before


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two small CLIP text models and a small T5, as ``save_pretrained`` writes them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    def words(begin: bool) -> Any:
        own = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
        )
        own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        template = "<begin> $A <end>" if begin else "$A <end>"
        own.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<begin>", 2), ("<end>", 3)]
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=own, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
        )

    root = tmp_path_factory.mktemp("encoders")
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, size in (("first", 8), ("second", 16)):
            config = transformers.CLIPTextConfig(
                vocab_size=len(WORDS), hidden_size=size, intermediate_size=12, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=8, pad_token_id=0, bos_token_id=2,
                eos_token_id=3,
            )  # fmt: skip
            transformers.CLIPTextModel(config).save_pretrained(root / name)
            words(begin=True).save_pretrained(root / name)
            found[name] = root / name
        config = transformers.T5Config(
            vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2,
            pad_token_id=0, eos_token_id=3,
        )  # fmt: skip
        transformers.T5EncoderModel(config).save_pretrained(root / "t5")
        words(begin=False).save_pretrained(root / "t5")
        found["t5"] = root / "t5"
    return found


def clip_pair(folders: dict[str, Path], **changes: Any) -> CLIPPair:
    settings: dict[str, Any] = {
        "source": str(folders["first"]),
        "second_source": str(folders["second"]),
        "num_tokens": 8,
        "token_size": 24,
        "pooled_size": 16,
    }
    return CLIPPair(**{**settings, **changes})


class TestCLIPPair:
    def test_states_of_both_side_by_side_pooled_of_the_second(
        self, folders: dict[str, Path]
    ) -> None:
        encoder = clip_pair(folders)
        assert encoder.check() == []
        found = encoder.encode(["two red circle", "blue"])
        assert found.mask.sum(1).tolist() == [5, 3]
        ids = torch.tensor([[2, 7, 4, 6, 3, 0, 0, 0], [2, 5, 3, 0, 0, 0, 0, 0]])
        start = 0
        for name, size in (("first", 8), ("second", 16)):
            folder = Folder("text_encoder.source", str(folders[name]), "a CLIP text model")
            model = load_model(folder, "CLIPTextModel", "float32")
            with torch.no_grad():
                out = model(input_ids=ids, attention_mask=(ids > 0).long())
            part = found.tokens[..., start : start + size]
            states = out.last_hidden_state
            torch.testing.assert_close(part[found.mask], states[found.mask], rtol=0, atol=1e-6)
            start += size
        torch.testing.assert_close(found.pooled, out.pooler_output, rtol=0, atol=1e-6)
        end = torch.stack((states[0, 4], states[1, 2]))  # the state of <end>, without projection
        torch.testing.assert_close(found.pooled, end, rtol=0, atol=1e-6)

    def test_the_empty_prompt_has_two_tokens(self, folders: dict[str, Path]) -> None:
        assert clip_pair(folders).encode([""], null=True).mask.sum() == 2

    def test_long_prompts_are_refused_or_cut(self, folders: dict[str, Path]) -> None:
        text = "two red circle two red circle two"
        with pytest.raises(ConfigError, match="has 9 tokens, but text_encoder=clip_pair takes 8"):
            clip_pair(folders).encode([text])
        assert clip_pair(folders, truncate=True).encode([text]).mask.all()

    def test_other_widths_are_told_of(self, folders: dict[str, Path]) -> None:
        (problem,) = clip_pair(folders, token_size=2048, pooled_size=1280).check()
        assert "the two models have widths 8 and 16. Give 24 and 16" in problem

    def test_digests_follow_from_weights_and_settings(self, folders: dict[str, Path]) -> None:
        swapped = clip_pair(folders, source=str(folders["second"]))
        digests = {clip_pair(folders).digest(), swapped.digest()}
        digests |= {clip_pair(folders, precision="bfloat16").digest(), clip_pair(folders).digest()}
        assert len(digests) == 3

    def test_half_precision_comes_close(self, folders: dict[str, Path]) -> None:
        full = clip_pair(folders).encode(["two red circle"])
        half = clip_pair(folders, precision="bfloat16").encode(["two red circle"])
        assert half.tokens.dtype == torch.float32
        torch.testing.assert_close(half.tokens, full.tokens, rtol=0, atol=0.1)


class TestT5:
    def test_states_and_their_mean(self, folders: dict[str, Path]) -> None:
        encoder = T5(source=str(folders["t5"]), num_tokens=6, token_size=8, pooled_size=8)
        assert encoder.check() == []
        found = encoder.encode(["two red circle", "blue"])
        assert found.mask.sum(1).tolist() == [4, 2]
        folder = Folder("text_encoder.source", str(folders["t5"]), "a T5 encoder")
        model = load_model(folder, "T5EncoderModel", "float32")
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([[5, 3]])).last_hidden_state
        torch.testing.assert_close(found.tokens[1, :2], alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.pooled[1], alone[0].mean(0), rtol=0, atol=1e-5)
        assert encoder.count_tokens(["two red circle"]) == [4]
        assert len(encoder.digest()) == 64

    def test_another_width_is_told_of(self, folders: dict[str, Path]) -> None:
        (problem,) = T5(source=str(folders["t5"])).check()
        assert "text_encoder.token_size=4096 was given, but d_model" in problem

    def test_weights_that_are_lacking_are_told_of(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        from safetensors.torch import save_file

        for file in folders["t5"].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
        folder = Folder("text_encoder.source", str(tmp_path), "a T5 encoder")
        with pytest.raises(CheckpointError, match="keys are missing in"):
            load_model(folder, "T5EncoderModel", "float32")
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"The tokenizer of .* cannot be loaded"):
            load_tokenizer(folder)


def test_without_transformers_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ImportError, match=r'pip install "genscale\[transformers\]"'):
        check_transformers("t5")
