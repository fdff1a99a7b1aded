"""The encoder of a T5 model (arXiv:1910.10683), as many text-to-image models read it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch

from genscale.conditioning.text import TextEmbedding, TextEncoder, masked_mean
from genscale.conditioning.transformers_folder import (
    Folder,
    check_precision,
    check_transformers,
    load_model,
    load_tokenizer,
)
from genscale.errors import CheckpointError, ConfigError

_LAYOUT = "t5 1"  # changes when the same weights would give other embeddings


class T5(TextEncoder):
    """A T5 encoder through transformers; the weights are read when first needed.

    Tokens are the encoder's last hidden states; the pooled vector is their mean over the prompt's
    own tokens, as T5 has none of its own.

    Args:
        source: folder of the model, e.g. of google/t5-v1_1-xxl.
        num_tokens: N, the end's token included.
        token_size: width D; checked against config.json.
        pooled_size: must be ``token_size``.
        truncate: cut longer prompts instead of refusing them.
        precision: of weights and arithmetic; embeddings are float32. float16 overflows in T5.

    Raises:
        ConfigError: an unknown precision, or sizes that do not fit together.
    """

    name = "t5"

    def __init__(
        self,
        *,
        source: str | None = None,
        num_tokens: int = 120,
        token_size: int = 4096,
        pooled_size: int = 4096,
        truncate: bool = False,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        check_precision(precision)
        if pooled_size != token_size:
            raise ConfigError(
                f"text_encoder.pooled_size={pooled_size} must be text_encoder.token_size="
                f"{token_size}, of which it is the mean. Give the same number."
            )
        self.num_tokens, self.token_size, self.pooled_size = num_tokens, token_size, pooled_size
        self.truncate, self.precision = truncate, precision
        self.folder = Folder("text_encoder.source", source, "a T5 encoder")
        self._model: torch.nn.Module | None = None
        self._words: Any = None

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return the word pieces of each prompt, and one more."""
        if not prompts:
            return []
        return [len(ids) for ids in self._tokenizer()(list(prompts))["input_ids"]]

    def digest(self) -> str:
        """Return the SHA-256 of the folder and the settings."""
        words = (_LAYOUT, self.num_tokens, self.truncate, self.precision, self.folder.digest())
        return hashlib.sha256(repr(words).encode()).hexdigest()

    def check(self) -> list[str]:
        """Return a sentence where the folder or the package is missing, or sizes differ."""
        try:
            size = self.folder.config().get("d_model")
            check_transformers(self.name)
        except (CheckpointError, ConfigError, ImportError) as error:
            return [str(error)]
        if size != self.token_size:
            return [
                f"text_encoder.token_size={self.token_size} was given, but d_model in the "
                f"config.json of {self.folder.key}={self.folder.place} is {size}. Give that as "
                "text_encoder.token_size and text_encoder.pooled_size."
            ]
        return []

    def _encode(self, prompts: list[str]) -> TextEmbedding:
        if self._model is None:
            check_transformers(self.name)
            self._model = load_model(self.folder, "T5EncoderModel", self.precision).to(self.device)
        words = self._tokenizer()(
            prompts,
            padding="max_length",
            max_length=self.num_tokens,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        mask = words["attention_mask"]
        out = self._model(input_ids=words["input_ids"], attention_mask=mask)
        tokens = out.last_hidden_state.float()
        return TextEmbedding(tokens, mask.bool(), masked_mean(tokens, mask))

    def _tokenizer(self) -> Any:
        if self._words is None:
            check_transformers(self.name)
            self._words = load_tokenizer(self.folder)
        return self._words
