"""A text encoder without weights: every word has a fixed random vector of its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from genscale import rng
from genscale.conditioning.text import TextEmbedding, TextEncoder
from genscale.errors import ConfigError

_WORD = re.compile(r"\w+|[^\w\s]")
_LAYOUT = "words 1"  # changes when the same words would give other numbers
_START = ""  # the word before the first one


class Words(TextEncoder):
    """Hashed words: what two captions share is that they use the same words, and nothing else.

    It knows no language ("crimson" is as far from "red" as "two" is), but needs no file and no
    package, and is enough for captions of a fixed small vocabulary. A token's first half of
    channels is its word, its second half the pair of it and the word before, so that the order of
    words is seen by models that give tokens no places, and in the pooled vector. The first token
    stands for the beginning; an empty prompt has it alone. Upper and lower case are one.

    Args:
        num_tokens: N; a prompt has one token more than words and signs.
        token_size: width D, even; entries are standard normal.
        pooled_size: must be ``token_size``: the pooled vector is the sum of the tokens over the
            root of their number.
        truncate: cut longer prompts instead of refusing them.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    name = "words"
    worth_keeping = False

    def __init__(
        self,
        *,
        num_tokens: int = 32,
        token_size: int = 64,
        pooled_size: int = 64,
        truncate: bool = False,
    ) -> None:
        super().__init__()
        if num_tokens < 2 or token_size < 2 or token_size % 2:
            raise ConfigError(
                f"text_encoder.num_tokens={num_tokens} must be at least 2, and "
                f"text_encoder.token_size={token_size} even and at least 2. Give e.g. 32 and 64."
            )
        if pooled_size != token_size:
            raise ConfigError(
                f"text_encoder.pooled_size={pooled_size} must be text_encoder.token_size="
                f"{token_size}, of which it is the sum. Give the same number."
            )
        self.num_tokens, self.token_size, self.pooled_size = num_tokens, token_size, pooled_size
        self.truncate = truncate

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return the words and signs of each prompt, and one more."""
        return [1 + len(_WORD.findall(prompt)) for prompt in prompts]

    def digest(self) -> str:
        """Return the SHA-256 of the sizes: there is nothing else."""
        words = (_LAYOUT, self.num_tokens, self.token_size, self.truncate)
        return hashlib.sha256(repr(words).encode()).hexdigest()

    def _encode(self, prompts: list[str]) -> TextEmbedding:
        tokens = torch.zeros(len(prompts), self.num_tokens, self.token_size)
        mask = torch.zeros(len(prompts), self.num_tokens, dtype=torch.bool)
        half = self.token_size // 2
        for i, prompt in enumerate(prompts):
            words = [_START, *_WORD.findall(prompt.lower())][: self.num_tokens]
            pairs = [f"{before} {word}" for before, word in pairwise([_START, *words])]
            mask[i, : len(words)] = True
            tokens[i, : len(words), :half] = torch.stack([_vector(word, half) for word in words])
            tokens[i, : len(words), half:] = torch.stack([_vector(pair, half) for pair in pairs])
        pooled = tokens.sum(1) / mask.sum(1, keepdim=True).sqrt()
        return TextEmbedding(*(x.to(self.device) for x in (tokens, mask, pooled)))


@lru_cache(maxsize=65536)
def _vector(word: str, size: int) -> Tensor:
    """Return the normal vector ``(size,)`` of a word or pair, the same on every machine."""
    number = int.from_bytes(hashlib.sha256(f"{_LAYOUT} {word}".encode()).digest()[:8], "big")
    return rng.normal(rng.key(number), (size,))
