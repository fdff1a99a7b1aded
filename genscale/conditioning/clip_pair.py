"""The text towers of two CLIP models side by side, as Switti reads them (arXiv:2412.01819)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch

from genscale.conditioning.text import TextEmbedding, TextEncoder
from genscale.conditioning.transformers_folder import (
    Folder,
    check_precision,
    check_transformers,
    load_model,
    load_tokenizer,
)
from genscale.errors import CheckpointError, ConfigError

_LAYOUT = "clip_pair 1"  # changes when the same weights would give other embeddings


class CLIPPair(TextEncoder):
    """Two CLIP text models through transformers; the weights are read when first needed.

    Tokens are the last hidden states of both, after their final norms, side by side. The mask is
    that of the second tokenizer; each model sees its own. The pooled vector is the second model's
    state at the end of the text, without its projection.

    Args:
        source: folder of the first model, e.g. of openai/clip-vit-large-patch14.
        second_source: of the second, e.g. of laion/CLIP-ViT-bigG-14-laion2B-39B-b160k.
        num_tokens: N, beginning and end included.
        token_size: width of both together; checked against their config.json.
        pooled_size: width of the second; checked likewise.
        truncate: cut longer prompts instead of refusing them.
        precision: of weights and arithmetic; embeddings are float32.

    Raises:
        ConfigError: an unknown precision.
    """

    name = "clip_pair"

    def __init__(
        self,
        *,
        source: str | None = None,
        second_source: str | None = None,
        num_tokens: int = 77,
        token_size: int = 2048,
        pooled_size: int = 1280,
        truncate: bool = False,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        check_precision(precision)
        self.num_tokens, self.token_size, self.pooled_size = num_tokens, token_size, pooled_size
        self.truncate, self.precision = truncate, precision
        self.folders = (
            Folder("text_encoder.source", source, "a CLIP text model"),
            Folder("text_encoder.second_source", second_source, "a second CLIP text model"),
        )
        self._models: torch.nn.ModuleList | None = None
        self._words: list[Any] | None = None

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return the larger of both tokenizers' counts for each prompt."""
        counts = [
            [len(ids) for ids in each(list(prompts))["input_ids"]] if prompts else []
            for each in self._tokenizers()
        ]
        return [max(pair) for pair in zip(*counts, strict=True)]

    def digest(self) -> str:
        """Return the SHA-256 of both folders and the settings."""
        words = (
            *(_LAYOUT, self.num_tokens, self.truncate, self.precision),
            *(folder.digest() for folder in self.folders),
        )
        return hashlib.sha256(repr(words).encode()).hexdigest()

    def check(self) -> list[str]:
        """Return a sentence where a folder or the package is missing, or sizes differ."""
        try:
            sizes = [int(folder.config()["hidden_size"]) for folder in self.folders]
            check_transformers(self.name)
        except KeyError:
            return ["The config.json of a CLIP text model has hidden_size. Give its folder."]
        except (CheckpointError, ConfigError, ImportError) as error:
            return [str(error)]
        if (sum(sizes), sizes[1]) != (self.token_size, self.pooled_size):
            return [
                f"text_encoder.token_size={self.token_size} and text_encoder.pooled_size="
                f"{self.pooled_size} were given, but the two models have widths {sizes[0]} and "
                f"{sizes[1]}. Give {sum(sizes)} and {sizes[1]}."
            ]
        return []

    def _encode(self, prompts: list[str]) -> TextEmbedding:
        if self._models is None:
            check_transformers(self.name)
            self._models = torch.nn.ModuleList(
                load_model(folder, "CLIPTextModel", self.precision) for folder in self.folders
            ).to(self.device)
        tokens = []
        for model, tokenizer in zip(self._models, self._tokenizers(), strict=True):
            words = tokenizer(
                prompts,
                padding="max_length",
                max_length=self.num_tokens,
                truncation=True,
                return_tensors="pt",
            ).to(self.device)
            out = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
            tokens.append(out.last_hidden_state)
        mask = words["attention_mask"].bool()  # of the second one
        return TextEmbedding(torch.cat(tokens, dim=-1), mask, out.pooler_output)

    def _tokenizers(self) -> list[Any]:
        if self._words is None:
            check_transformers(self.name)
            self._words = [load_tokenizer(folder) for folder in self.folders]
        return self._words
