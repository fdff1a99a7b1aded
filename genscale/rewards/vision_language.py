"""Asking a vision-language model of the transformers library a question of yes or no.

The answer is read from the next token's logits, not from generated text. What stands before the
picture in question, an instruction and often another picture, is the same for many pictures: its
keys and values are computed once.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.layers.norm import no_autocast

Part = str | np.ndarray
"""Of a message: a text, or a picture ``(H, W, 3)`` uint8."""

_YES = ("yes", "Yes", " yes", " Yes")
_NO = ("no", "No", " no", " No")
_CUE = "\nFinal answer (yes or no):"  # after a rationale
_KEPT_PREFIXES = 16
_TOLERANCE = {torch.float32: 1e-3}  # of logits with and without cache; halves: below
_HALF_TOLERANCE = 0.3


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What a model said of B pictures, on the CPU.

    Attributes:
        yes: ``(B,)`` float32 logsumexp of the logits of all spellings of yes.
        no: likewise of no.
        thoughts: ``(B,)`` int64 tokens of the rationales before.
    """

    yes: Tensor
    no: Tensor
    thoughts: Tensor


@dataclass(slots=True)
class _Prefix:
    cache: Any
    length: int


class VisionLanguage:
    """A vision-language model and its processor.

    Args:
        model: of ``AutoModelForImageTextToText``, frozen.
        processor: its own.
        batch_size: pictures in one forward pass.
        cache_prefix: compute what pictures have in common once. At its first use this is held
            against a pass without it.
        max_thoughts: the most tokens of a rationale; 0: the answer comes at once.

    Attributes:
        calls: pictures asked about so far.

    Raises:
        ConfigError: the model has no chat template, or no single token for yes or for no.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        batch_size: int = 8,
        cache_prefix: bool = True,
        max_thoughts: int = 0,
    ) -> None:
        self.model, self.processor = model, processor
        self.batch_size = batch_size
        self.cache_prefix = cache_prefix
        self.max_thoughts = max_thoughts
        self.calls = 0
        if getattr(processor, "chat_template", None) is None:
            raise ConfigError(
                "The processor in reward.folder has no chat template, and one is needed to ask "
                "questions. Give an instruction-tuned model."
            )
        tokenizer = processor.tokenizer
        self._yes, self._no = (_tokens_of(tokenizer, words) for words in (_YES, _NO))
        if not self._yes or not self._no or set(self._yes) & set(self._no):
            raise ConfigError(
                "The tokenizer in reward.folder has no single tokens for yes and for no, which "
                "the answer is read from. Choose another model."
            )
        names = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # by version
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        self._prefixes: OrderedDict[str, _Prefix] = OrderedDict()
        self._checked = False

    def ask(
        self, before: Sequence[Part], pictures: Sequence[np.ndarray], question: str
    ) -> Verdicts:
        """Ask about each of B pictures.

        Args:
            before: what stands before the picture.
            pictures: ``(H, W, 3)`` uint8 each, of one size.
            question: what stands after it.

        Raises:
            ConfigError: texts hold the model's word for a picture, or the model computes
                something else with the common part cached.
        """
        shown = [part for part in before if not isinstance(part, str)]
        head, tail = self._render(before, question, len(shown) + 1)
        self.calls += len(pictures)
        # rationales end at different tokens, so they are written one at a time
        size = 1 if self.max_thoughts else self.batch_size
        rows = []
        with torch.inference_mode(), no_autocast(self.model.device):
            for start in range(0, len(pictures), size):
                batch = pictures[start : start + size]
                logits, state = self._read(head, tail, shown, batch)
                thoughts = 0
                if self.max_thoughts:
                    logits, thoughts = self._think(logits, state)
                rows += [(row, thoughts) for row in logits.float().cpu()]
        logits = torch.stack([row for row, _ in rows])
        return Verdicts(
            logits[:, self._yes].logsumexp(1),
            logits[:, self._no].logsumexp(1),
            torch.tensor([count for _, count in rows]),
        )

    # ------------------------------------------------------------------ text

    def _render(self, before: Sequence[Part], question: str, count: int) -> tuple[str, str]:
        """Return the whole message's text, cut in front of the last picture."""
        content: list[dict[str, str]] = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in before
        ]
        content += [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        names = [getattr(self.processor, name, None) for name in ("boi_token", "image_token")]
        place = next((str(name) for name in names if name and str(name) in text), None)
        if place is None or text.count(place) != count:
            found = 0 if place is None else text.count(place)
            raise ConfigError(
                f"A message of {count} pictures has {found} places for them ({place}). Remove "
                "such words from captions, or choose another model for reward.folder."
            )
        cut = text.rindex(place)
        return text[:cut], text[cut:]

    def _inputs(
        self, text: str, pictures: Sequence[Sequence[np.ndarray]], *, begins: bool
    ) -> dict[str, Tensor]:
        """Return one row for every list of pictures; all have the same text."""
        bos = getattr(self.processor.tokenizer, "bos_token", None)
        special = begins and not (bos and text.startswith(bos))
        images = [list(each) for each in pictures] if any(map(len, pictures)) else None
        found = self.processor(
            text=[text] * len(pictures),
            images=images,
            add_special_tokens=special,
            return_tensors="pt",
        )
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in found.items()
        }

    # ------------------------------------------------------------------ network

    def _read(
        self, head: str, tail: str, shown: list[np.ndarray], batch: Sequence[np.ndarray]
    ) -> tuple[Tensor, _Prefix]:
        """Return the next token's logits ``(B, V)``, and what was read so far."""
        if not self.cache_prefix or not head:
            return self._read_whole(head + tail, shown, batch)
        prefix = self._prefix(head, shown)
        mine = copy.deepcopy(prefix.cache)  # the forward pass appends to it
        if len(batch) > 1:
            mine.batch_repeat_interleave(len(batch))
        inputs = self._inputs(tail, [[picture] for picture in batch], begins=False)
        logits, state = self._forward(inputs, _Prefix(mine, prefix.length))
        if not self._checked:
            whole, _ = self._read_whole(head + tail, shown, batch[:1])
            ids = [*self._yes, *self._no]
            off = float((whole[:, ids] - logits[:1, ids]).abs().max())
            if not off <= _TOLERANCE.get(self.model.dtype, _HALF_TOLERANCE):
                raise ConfigError(
                    f"{type(self.model).__name__} computes logits that differ by {off:.2g} where "
                    "the common part of messages is cached. Give reward.cache_prefix=false."
                )
            self._checked = True
        return logits, state

    def _read_whole(
        self, text: str, shown: list[np.ndarray], batch: Sequence[np.ndarray]
    ) -> tuple[Tensor, _Prefix]:
        inputs = self._inputs(text, [[*shown, picture] for picture in batch], begins=True)
        return self._forward(inputs, _Prefix(None, 0))

    def _prefix(self, head: str, shown: list[np.ndarray]) -> _Prefix:
        digest = hashlib.sha256(head.encode())
        for picture in shown:
            digest.update(repr(picture.shape).encode())
            digest.update(np.ascontiguousarray(picture).data)
        key = digest.hexdigest()
        if key not in self._prefixes:
            inputs = self._inputs(head, [shown], begins=True)
            self._prefixes[key] = self._forward(inputs, _Prefix(None, 0))[1]
            if len(self._prefixes) > _KEPT_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return self._prefixes[key]

    def _forward(self, inputs: dict[str, Tensor], before: _Prefix) -> tuple[Tensor, _Prefix]:
        """Read on; rows are of one length, so nothing is padded."""
        ids = inputs["input_ids"]
        length = before.length + ids.shape[1]
        inputs = inputs | {"attention_mask": ids.new_ones(len(ids), length)}
        memory = {} if before.cache is None else {self._cache_name: before.cache}
        out = self.model(**inputs, **memory, **self._last_only, use_cache=True)
        return out.logits[:, -1].float(), _Prefix(out[self._cache_name], length)

    def _think(self, logits: Tensor, state: _Prefix) -> tuple[Tensor, int]:
        """Write a rationale, the likeliest token at a time, and return the logits after it."""
        ends = _ends(self.model, self.processor.tokenizer)
        count = 0
        while count < self.max_thoughts:
            token = logits.argmax(-1, keepdim=True)  # (1, 1)
            if int(token) in ends:
                break
            logits, state = self._forward({"input_ids": token}, state)
            count += 1
        cue = self.processor.tokenizer(_CUE, add_special_tokens=False, return_tensors="pt")
        logits, _ = self._forward({"input_ids": cue["input_ids"].to(logits.device)}, state)
        return logits, count


def _tokens_of(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Return the different tokens that are one of the words as a whole."""
    found: list[int] = []
    for word in words:
        ids = tokenizer.encode(word, add_special_tokens=False)
        if len(ids) == 1 and ids[0] not in found and ids[0] != tokenizer.unk_token_id:
            found.append(ids[0])
    return found


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens after which a model has nothing more to say."""
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named, tokenizer.eos_token_id]
    return {token for token in listed if token is not None}
