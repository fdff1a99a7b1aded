"""A caption is encoded once: its embedding follows from it alone, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from genscale.conditioning.text import TextEmbedding
from genscale.conditioning.words import Words
from genscale.errors import ConfigError
from genscale.io.files import cache_home
from genscale.text_cache import TextCache


class Slow(Words):
    """An encoder worth keeping files of, which counts what it is asked for."""

    worth_keeping = True

    def __init__(self, salt: float = 0.0, num_tokens: int = 6) -> None:
        super().__init__(num_tokens=num_tokens, token_size=8, pooled_size=8)
        self.asked: list[str] = []
        self.salt = salt

    def digest(self) -> str:
        return f"{super().digest()}{self.salt}"

    def _encode(self, prompts: list[str]) -> TextEmbedding:
        self.asked += prompts
        found = super()._encode(prompts)
        return TextEmbedding(found.tokens + self.salt, found.mask, found.pooled)


def tensors(found: TextEmbedding) -> list[Tensor]:
    return [found.tokens, found.mask, found.pooled]


def test_each_caption_is_encoded_once_and_alone(tmp_path: Path) -> None:
    encoder = Slow()
    cache = TextCache(encoder, folder=tmp_path)
    first = cache.embed(["a circle", "a ring", "a circle"])
    again = cache.embed(["a ring"])
    assert encoder.asked == ["a circle", "a ring"]
    assert cache.encoded == 2
    expected = Slow().encode(["a circle", "a ring", "a circle"])
    for one, other in zip(tensors(first), tensors(expected), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(again.tokens[0], first.tokens[1])


def test_another_run_reads_the_same_bits_from_disk(tmp_path: Path) -> None:
    first = TextCache(Slow(), folder=tmp_path).embed(["a circle", "a long blue ring"])
    encoder = Slow()
    second = TextCache(encoder, folder=tmp_path).embed(["a long blue ring", "a circle"])
    assert encoder.asked == []
    for one, other in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(one, other.flip(0))
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    assert max(file.stat().st_size for file in files) < 500  # of a prompt's own tokens only


def test_another_encoder_finds_nothing(tmp_path: Path) -> None:
    TextCache(Slow(), folder=tmp_path).embed(["a circle"])
    other = Slow(salt=1.0)
    TextCache(other, folder=tmp_path).embed(["a circle"])
    assert other.asked == ["a circle"]


def test_a_damaged_file_is_told_of_and_made_again(tmp_path: Path) -> None:
    whole = TextCache(Slow(), folder=tmp_path).embed(["a circle"])
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.warns(UserWarning, match="is damaged: the embedding of a caption was expected"):
        found = TextCache(Slow(), folder=tmp_path).embed(["a circle"])
    assert torch.equal(found.tokens, whole.tokens)
    encoder = Slow()
    TextCache(encoder, folder=tmp_path).embed(["a circle"])
    assert encoder.asked == []  # it was mended


def test_a_folder_that_cannot_be_written_is_told_of_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = TextCache(Slow(), folder=tmp_path / "file")
    with pytest.warns(UserWarning, match="cannot be kept in") as told:
        cache.embed(["a circle", "a ring"])
    assert len(told) == 1


def test_memory_is_bounded(tmp_path: Path) -> None:
    encoder = Slow()
    row = 4 * (8 * 3 + 8)  # bytes of three tokens and the pooled vector
    cache = TextCache(encoder, folder=tmp_path, memory=2 * row)
    cache.embed(["a b", "c d", "e f"])
    cache.embed(["a b"])
    assert encoder.asked == ["a b", "c d", "e f"]  # what memory gave up came from the file
    cheap = TextCache(Words(token_size=8, pooled_size=8), memory=2 * row)
    cheap.embed(["a b", "c d", "e f"])
    cheap.embed(["e f"])
    assert cheap.encoded == 3
    cheap.embed(["a b"])
    assert cheap.encoded == 4


def test_an_encoder_that_costs_nothing_writes_no_files(tmp_path: Path) -> None:
    TextCache(Words(), folder=tmp_path).embed(["a circle"])
    assert list(tmp_path.iterdir()) == []


def test_the_empty_prompt_is_the_null_one_and_no_other(tmp_path: Path) -> None:
    cache = TextCache(Slow(), folder=tmp_path)
    cache.embed([""], null=True)
    with pytest.raises(ConfigError, match=r"Prompt 1 of 1 \(''\) is empty"):
        cache.embed([""])  # although it is known


def test_conditions_carry_text_labels_requests_and_the_null_text(tmp_path: Path) -> None:
    cache = TextCache(Slow(), folder=tmp_path)
    labels = torch.tensor([3, 4])
    cond = cache.condition(["a ring", "a star"], labels=labels)
    own, empty = Slow().encode(["a ring", "a star"]), Slow().encode([""], null=True)
    assert cond.requests == ("a ring", "a star")
    assert cond.labels is labels
    assert cond.text is not None
    assert torch.equal(cond.text, own.tokens)
    null = cond.null()
    assert null.text is not None
    assert null.text_mask is not None
    assert null.pooled_text is not None
    for row in range(2):
        assert torch.equal(null.text[row], empty.tokens[0])
        assert torch.equal(null.text_mask[row], empty.mask[0])
        assert torch.equal(null.pooled_text[row], empty.pooled[0])
    led = cache.condition(["a ring"], negative="a star").null()
    assert led.text is not None
    assert torch.equal(led.text[0], own.tokens[1])


def test_files_lie_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENSCALE_CACHE", str(tmp_path / "here"))
    assert cache_home() == tmp_path / "here"
    TextCache(Slow()).embed(["a circle"])
    assert len(list((tmp_path / "here" / "texts").rglob("*.safetensors"))) == 1
