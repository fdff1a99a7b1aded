"""The one object in which conditions travel from the data to the backbone."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

NULL_LABEL = -1  # backbones map it to the last row of their class table


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a sample is conditioned on; every field is optional and has a leading batch axis.

    Shapes:
        labels: ``(B,)`` int64 class ids; :data:`NULL_LABEL` (-1) is the null class.
        text: ``(B, N, D)`` token embeddings, with ``text_mask`` ``(B, N)`` bool.
        pooled_text: ``(B, D)``.
        size: ``(B, 2)`` height and width in pixels.
        frame_rate: ``(B,)`` frames a second.
        reference: ``(B, C, H, W)`` low-resolution or reference image in [-1, 1], with its
            noise level ``reference_level`` ``(B,)``.
        requests: B raw captions or scenes; rewards read them, no backbone does.
        negative: what the text is replaced by where the condition is dropped, as conditions of
            the same B samples: the encoded empty prompt, or a negative prompt. Only its text
            fields are read. Without it, dropped text is zero and masked out.
    """

    labels: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled_text: Tensor | None = None
    size: Tensor | None = None
    frame_rate: Tensor | None = None
    reference: Tensor | None = None
    reference_level: Tensor | None = None
    requests: tuple[Any, ...] | None = None
    negative: Conditioning | None = None

    def _map(self, function: Any) -> Conditioning:
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, Conditioning):
                changed[field.name] = value._map(function)
        return replace(self, **changed)

    def __len__(self) -> int:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                return len(value)
        return 0

    def to(self, device: torch.device | str) -> Conditioning:
        """Move every tensor to ``device``."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def select(self, index: Tensor) -> Conditioning:
        """Take the rows ``index`` (int64, repeats allowed)."""
        picked = self._map(lambda value: value[index.to(value.device)])
        if self.requests is not None:
            picked = replace(picked, requests=tuple(self.requests[i] for i in index.tolist()))
        return picked

    def repeat(self, n: int) -> Conditioning:
        """Repeat every row ``n`` times in place: a b -> a a b b."""
        return self.select(torch.arange(len(self)).repeat_interleave(n))

    def null(self) -> Conditioning:
        """Return the unconditional twin: null labels, and the negative text or masked zeros.

        Size, frame rate and reference are kept: they describe the picture, not the wish.
        """
        tensors = (getattr(self, field.name) for field in fields(self))
        # made where it is used: nothing is copied to the device
        device = next((value.device for value in tensors if isinstance(value, Tensor)), None)
        return self.drop(torch.ones(len(self), dtype=torch.bool, device=device))

    def drop(self, mask: Tensor) -> Conditioning:
        """Replace the condition by the null condition where ``mask`` ``(B,)`` bool is true."""
        changed: dict[str, Any] = {}
        if self.labels is not None:
            changed["labels"] = self.labels.masked_fill(mask.to(self.labels.device), NULL_LABEL)
        for name in ("text", "text_mask", "pooled_text"):
            own = getattr(self, name)
            if own is not None:
                other = None if self.negative is None else getattr(self.negative, name)
                rows = mask.to(own.device).view(-1, *[1] * (own.dim() - 1))
                # zero is False in a mask
                changed[name] = torch.where(
                    rows, torch.zeros_like(own) if other is None else other, own
                )
        return replace(self, **changed)

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        """Concatenate along the batch; all parts must carry the same fields."""
        joined: dict[str, Any] = {}
        for field in fields(Conditioning):
            values = [getattr(part, field.name) for part in parts]
            if any(value is None for value in values):
                if not all(value is None for value in values):
                    raise ValueError(
                        f"Cannot join conditions: '{field.name}' is given in some and missing in "
                        "others. Give it for every sample or for none."
                    )
                continue
            if field.name == "requests":
                joined[field.name] = tuple(item for value in values for item in value)
            elif field.name == "negative":
                joined[field.name] = Conditioning.cat(values)
            else:
                joined[field.name] = torch.cat(values)
        return Conditioning(**joined)
