"""The contract of a text encoder: captions and prompts -> tokens, a mask, one pooled vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import ConfigError
from genscale.layers.norm import no_autocast

_SHOWN = 60  # characters of a prompt in a sentence


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """Encoded prompts.

    Shapes:
        tokens: ``(B, N, D)`` float32, padded with zeros to the encoder's number of tokens.
        mask: ``(B, N)`` bool, true for the first tokens, which belong to the prompt.
        pooled: ``(B, P)`` float32, the prompt as a whole.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


class TextEncoder(nn.Module, ABC):
    """A frozen network from words to vectors, whose weights are read when they are first needed.

    Attributes:
        name: word for logs and file names.
        num_tokens: N, what every prompt is padded to; a longer prompt is refused.
        token_size: width D of the tokens.
        pooled_size: width P of the pooled vector.
        truncate: cut longer prompts after N tokens instead of refusing them.
        worth_keeping: whether encoding costs more than reading the result from a file.
    """

    name: str
    num_tokens: int
    token_size: int
    pooled_size: int
    truncate: bool = False
    worth_keeping: bool = True
    place: Tensor

    def __init__(self) -> None:
        super().__init__()
        # knows the device while there are no weights yet
        self.register_buffer("place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the encoder computes."""
        return self.place.device

    def encode(self, prompts: Sequence[str], *, null: bool = False) -> TextEmbedding:
        """Encode prompts, in float32 whatever the precision around it.

        Args:
            prompts: B texts.
            null: allow the empty text, which stands for "no prompt".

        Raises:
            ConfigError: a prompt is empty or has too many tokens; it is quoted.
            CheckpointError: the weights cannot be loaded.
            ImportError: a package is missing.
        """
        problem = self.prompt_problem(prompts, null=null)
        if problem is not None:
            raise ConfigError(problem)
        with torch.no_grad(), no_autocast(self.device):
            found = self._encode(list(prompts))
        # networks put something into the padding, too; nobody is to read it
        tokens = found.tokens.float().masked_fill(~found.mask[:, :, None], 0.0)
        return TextEmbedding(tokens, found.mask, found.pooled.float())

    def prompt_problem(
        self, prompts: Sequence[str], *, null: bool = False, what: str = "Prompt"
    ) -> str | None:
        """Return a sentence about the first prompt that cannot be encoded, or None.

        Args:
            prompts: texts.
            null: allow the empty text.
            what: what the sentence calls a prompt.
        """
        for i, prompt in enumerate(prompts):
            place = f"{what} {i + 1} of {len(prompts)}"
            if not isinstance(prompt, str):
                return f"{place} is {prompt!r}, and a text was expected. Put it in quotes."
            if not prompt.strip() and not (null and prompt == ""):
                return f"{place} ({prompt!r}) is empty. Write what the picture shows, or remove it."
        if self.truncate:
            return None
        for i, count in enumerate(self.count_tokens(prompts)):
            if count > self.num_tokens:
                return (
                    f"{what} {i + 1} of {len(prompts)} ({_quoted(prompts[i])}) has {count} tokens, "
                    f"but text_encoder={self.name} takes {self.num_tokens}. Shorten it, or cut "
                    "all longer ones with text_encoder.truncate=true."
                )
        return None

    @abstractmethod
    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt has, those at its beginning and end included."""

    @abstractmethod
    def digest(self) -> str:
        """Return a SHA-256 (64 hex digits) of everything that embeddings follow from."""

    def check(self) -> list[str]:
        """Return a sentence for everything that is missing; weights are not read."""
        return []

    @abstractmethod
    def _encode(self, prompts: list[str]) -> TextEmbedding: ...


class NoText(TextEncoder):
    """No text encoder: for models that read no text.

    Args:
        num_tokens: 0, as all sizes; they stand in the config for models to refer to.
        token_size: 0.
        pooled_size: 0.
    """

    name = "none"

    def __init__(self, *, num_tokens: int = 0, token_size: int = 0, pooled_size: int = 0) -> None:
        super().__init__()
        if (num_tokens, token_size, pooled_size) != (0, 0, 0):
            raise ConfigError(
                "text_encoder=none encodes nothing, so its sizes are 0. Choose an encoder, e.g. "
                "text_encoder=minilm."
            )
        self.num_tokens = self.token_size = self.pooled_size = 0

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return 0 for every prompt."""
        return [0] * len(prompts)

    def digest(self) -> str:
        """Return 64 zeros: there is nothing that an embedding could follow from."""
        return "0" * 64

    def _encode(self, prompts: list[str]) -> TextEmbedding:
        raise ConfigError(
            f"{_quoted(prompts[0]) if prompts else 'A prompt'} cannot be encoded by "
            "text_encoder=none. Choose an encoder, e.g. text_encoder=minilm."
        )


def reads_text(config: Mapping[str, Any]) -> bool:
    """Return whether a backbone of this config reads text: tokens, a pooled vector, or both."""
    return bool(config.get("text_size") or config.get("pooled_text_size"))


def fit_problems(config: Mapping[str, Any], encoder: TextEncoder) -> list[str]:
    """Return a sentence for every size of text that a backbone expects and an encoder lacks.

    Args:
        config: the backbone's; ``text_size``, ``num_text_tokens`` and ``pooled_text_size`` are
            read, where 0 or a missing one reads nothing.
        encoder: what will encode.
    """
    pairs = [("pooled_text_size", encoder.pooled_size)]
    if config.get("text_size"):
        pairs += [("text_size", encoder.token_size), ("num_text_tokens", encoder.num_tokens)]
    return [
        f"model.{name}={config[name]}, but text_encoder={encoder.name} gives {size}. Give "
        f"model.{name}={size}, or the encoder that the model was made for."
        for name, size in pairs
        if config.get(name) and config[name] != size
    ]


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean ``(B, D)`` of the tokens ``(B, N, D)`` that ``mask`` ``(B, N)`` counts."""
    weights = mask.to(tokens.dtype)[:, :, None]
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1.0)


def _quoted(prompt: str) -> str:
    return repr(prompt if len(prompt) <= _SHOWN else prompt[:_SHOWN].rstrip() + "...")
