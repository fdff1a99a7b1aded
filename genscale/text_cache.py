"""Embeddings of captions, each computed once: in memory, and in files where that pays.

A run sees every caption of its data many times, and many runs see the same ones. A caption is
encoded alone, so that its embedding follows from it and the encoder, whatever captions stood
beside it in a batch: an interrupted run that goes on elsewhere reads or computes the same bits.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.conditioning.text import TextEmbedding, TextEncoder
from genscale.errors import ConfigError
from genscale.io.files import atomic_write, cache_home

_LAYOUT = "1"  # changes when files of an older layout must not be read any more


class TextCache:
    """A text encoder that remembers.

    Args:
        encoder: frozen; it is moved with :meth:`to`.
        folder: where files lie; made if missing. None means ``$GENSCALE_CACHE``, else
            ``~/.cache/genscale``, below it texts. Encoders that cost nothing write no files.
        memory: bytes kept in memory, the longest unused given up first.

    Attributes:
        encoder: as given.
        encoded: captions encoded so far, not found in memory or in a file.
    """

    def __init__(
        self, encoder: TextEncoder, *, folder: Path | None = None, memory: int = 1 << 30
    ) -> None:
        self.encoder = encoder.requires_grad_(False).eval()
        self.encoded = 0
        self._folder = folder or cache_home() / "texts"
        self._writes = encoder.worth_keeping
        self._memory = memory
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0
        self._home: Path | None = None  # where files of this encoder and device lie

    def to(self, device: torch.device | str) -> TextCache:
        """Move the encoder; embeddings will come on its device."""
        before, device = self.encoder.device, torch.device(device)
        if before != device:
            self.encoder.to(device)
        if before.type != device.type:  # another kind of device rounds differently
            self._kept.clear()
            self._bytes, self._home = 0, None
        return self

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> TextEmbedding:
        """Return the embeddings of B prompts on the encoder's device.

        Args:
            prompts: texts, repeats allowed.
            null: allow the empty text.

        Raises:
            ConfigError: a prompt is empty or has too many tokens; it is quoted.
            CheckpointError: the encoder's weights cannot be loaded.
        """
        known = all(prompt in self._kept for prompt in prompts)
        if not known or (not null and "" in prompts):
            problem = self.encoder.prompt_problem(prompts, null=null)
            if problem is not None:
                raise ConfigError(problem)
        rows = {prompt: self._row(prompt) for prompt in prompts}
        device = self.encoder.device
        stacked = []
        for name in ("tokens", "mask", "pooled"):
            whole = torch.stack([self._padded(rows[prompt], name) for prompt in prompts])
            if device.type == "cuda":
                whole = whole.pin_memory()  # else the copy would wait for the device
            stacked.append(whole.to(device, non_blocking=True))
        return TextEmbedding(*stacked)

    def condition(
        self,
        prompts: Sequence[str],
        *,
        labels: Tensor | None = None,
        negative: str | None = None,
    ) -> Conditioning:
        """Return the conditions of B prompts; their null twin has the empty or negative prompt.

        Args:
            prompts: B texts, not empty.
            labels: ``(B,)`` class ids beside them, or None.
            negative: prompt to lead away from; None is the empty one.
        """
        own = self.embed(prompts)
        null = self.embed([negative or ""], null=not negative)
        count = len(prompts)
        return Conditioning(
            labels=labels,
            text=own.tokens,
            text_mask=own.mask,
            pooled_text=own.pooled,
            requests=tuple(prompts),
            negative=Conditioning(
                text=null.tokens.expand(count, -1, -1),
                text_mask=null.mask.expand(count, -1),
                pooled_text=null.pooled.expand(count, -1),
            ),
        )

    def _padded(self, row: dict[str, Tensor], name: str) -> Tensor:
        if name == "pooled":
            return row[name]
        missing = self.encoder.num_tokens - len(row["tokens"])
        if name == "mask":
            return F.pad(row["tokens"].new_ones(len(row["tokens"]), dtype=torch.bool), (0, missing))
        return F.pad(row["tokens"], (0, 0, 0, missing))

    def _row(self, prompt: str) -> dict[str, Tensor]:
        """Return one prompt's tokens, without padding, and pooled vector, on the CPU.

        They come from the nearest place that has them.
        """
        row = self._kept.get(prompt)
        if row is not None:
            self._kept.move_to_end(prompt)
            return row
        file = self._file(prompt) if self._writes else None
        row = None if file is None else self._read(file)
        if row is None:
            found = self.encoder.encode([prompt], null=True)
            length = int(found.mask[0].sum())
            row = {"tokens": found.tokens[0, :length].cpu(), "pooled": found.pooled[0].cpu()}
            self.encoded += 1
            if file is not None:
                self._write(file, row)
        self._kept[prompt] = row
        self._bytes += _size(row)
        while self._bytes > self._memory and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return row

    def _file(self, prompt: str) -> Path:
        if self._home is None:
            words = (_LAYOUT, self.encoder.digest(), self.encoder.device.type)
            digest = hashlib.sha256(repr(words).encode()).hexdigest()
            self._home = self._folder / f"{self.encoder.name}-{digest[:16]}"
        name = hashlib.sha256(prompt.encode()).hexdigest()
        return self._home / name[:2] / f"{name[2:34]}.safetensors"

    def _read(self, file: Path) -> dict[str, Tensor] | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not file.is_file():
            return None
        try:
            row: dict[str, Tensor] = load_file(file)
            length, *size = row["tokens"].shape
            if (size, list(row["pooled"].shape)) == (
                [self.encoder.token_size],
                [self.encoder.pooled_size],
            ) and 0 < length <= self.encoder.num_tokens:
                return row
        except (SafetensorError, KeyError, OSError, ValueError):
            pass
        warnings.warn(
            f"{file} is damaged: the embedding of a caption was expected. It is computed again.",
            stacklevel=2,
        )
        return None

    def _write(self, file: Path, row: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        try:
            with atomic_write(file) as temporary:
                save_file({name: value.contiguous() for name, value in row.items()}, temporary)
        except OSError as error:
            self._writes = False
            warnings.warn(
                f"Embeddings of captions cannot be kept in {self._folder} ({error.strerror}), so "
                "every run computes them anew. Set GENSCALE_CACHE to a folder that can be written.",
                stacklevel=2,
            )


def _size(row: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in row.values())
