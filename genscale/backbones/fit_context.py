"""What a clip is conditioned on, as a sequence of tokens that latents attend to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genscale.backbones.fit_layers import NumberEmbedding
from genscale.backbones.shapes import class_rows
from genscale.conditioning.base import Conditioning
from genscale.layers.embed import TimeEmbedding

FRAME_RATE_UNIT = 24.0  # frames a second whose period counts as 1
_FREQUENCIES = 8  # of learned waves


class ContextTokens(nn.Module):
    """Text, noise level, picture size, frame rate, level of the reference, class; in this order.

    A token whose number is not given is zero. So are tokens of text that its mask leaves out, or
    that of a sample without any text a learned token, where there is one.

    Args:
        size: width of the tokens.
        inner_size: width inside the layers that embed numbers.
        text_size: width of the text's tokens; 0 without text.
        num_text_tokens: their number where no text is given.
        text_null_token: learn what stands in the place of no text.
        reads_size: embed height and width of the picture, in units of ``size_unit`` pixels.
        size_unit: pixels.
        reads_frame_rate: embed the period between frames, 0 for a still picture, and whether it
            is one.
        reads_level: embed the noise level of a reference.
        num_classes: classes; 0 without.
        time_size: width of a fixed sinusoid of the time (in thousandths); 0 learns the waves.
    """

    def __init__(
        self,
        size: int,
        inner_size: int,
        *,
        text_size: int = 0,
        num_text_tokens: int = 0,
        text_null_token: bool = False,
        reads_size: bool = False,
        size_unit: float = 1.0,
        reads_frame_rate: bool = False,
        reads_level: bool = False,
        num_classes: int = 0,
        time_size: int = 0,
    ) -> None:
        super().__init__()
        self.text_shape = (num_text_tokens, text_size)
        self.num_classes, self.size_unit, self.time_size = num_classes, size_unit, time_size

        def waves() -> NumberEmbedding:
            return NumberEmbedding(1, inner_size, size, frequencies=_FREQUENCIES)

        def pair(wanted: bool) -> NumberEmbedding | None:
            return NumberEmbedding(2, inner_size, size) if wanted else None

        self.time: NumberEmbedding | TimeEmbedding
        self.time = TimeEmbedding(size, frequency_size=time_size) if time_size else waves()
        self.text = nn.Linear(text_size, size, bias=False) if text_size else None
        null_token = nn.Parameter(torch.empty(1, size)) if text_size and text_null_token else None
        self.text_null = null_token
        self.picture_size = pair(reads_size)
        self.frame_rate = pair(reads_frame_rate)
        self.level = waves() if reads_level else None
        self.classes = nn.Embedding(num_classes + 1, size) if num_classes else None

    def forward(self, t: Tensor, cond: Conditioning, batch: int) -> Tensor:
        """Return the tokens ``(B, N, size)``.

        Args:
            t: ``(B,)`` or ``(1,)``.
            cond: conditions of B samples.
            batch: B.

        Raises:
            ValueError: the text has another shape.
        """
        wave = self.time(1000.0 * t if self.time_size else t)[:, None]
        tokens = [wave.expand(batch, 1, wave.shape[-1])]
        if self.text is not None:
            tokens.insert(0, self._text(self.text, cond, batch, t.device))
        if self.picture_size is not None:
            sides = None if cond.size is None else cond.size.float() / self.size_unit
            tokens.append(_token(self.picture_size, sides, tokens[0]))
        if self.frame_rate is not None:
            rate = cond.frame_rate
            tokens.append(_token(self.frame_rate, None if rate is None else _pace(rate), tokens[0]))
        if self.level is not None:
            tokens.append(_token(self.level, cond.reference_level, tokens[0]))
        if self.classes is not None:
            rows = class_rows(cond.labels, self.num_classes, batch, t.device)
            tokens.append(self.classes(rows)[:, None])
        return torch.cat(tokens, dim=1)

    def _text(
        self, project: nn.Linear, cond: Conditioning, batch: int, device: torch.device
    ) -> Tensor:
        count, width = self.text_shape
        if cond.text is None:
            text = torch.zeros(batch, count, width, device=device)
            mask = torch.zeros(batch, count, dtype=torch.bool, device=device)
        elif cond.text.shape[::2] != (batch, width):
            raise ValueError(
                f"cond.text must have shape ({batch}, N, {width}), but has "
                f"{tuple(cond.text.shape)}. Give tokens of width model.text_size."
            )
        else:
            text = cond.text
            mask = text.new_ones(text.shape[:2], dtype=torch.bool)
            mask = mask if cond.text_mask is None else cond.text_mask.bool()
        tokens: Tensor = project(text.to(project.weight.dtype))
        tokens = tokens.masked_fill(~mask[:, :, None], 0.0)
        if self.text_null is None:
            return tokens
        absent = ~mask.any(dim=1)[:, None, None]
        return torch.where(absent, self.text_null.to(tokens.dtype), tokens)


def _pace(frame_rate: Tensor) -> Tensor:
    """Return ``(B, 2)``: the period, 0 at an infinite frame rate, and 1 for such still pictures."""
    still = torch.isinf(frame_rate)
    return torch.stack((FRAME_RATE_UNIT / frame_rate.float(), still.float()), dim=-1)


def _token(embed: NumberEmbedding, numbers: Tensor | None, like: Tensor) -> Tensor:
    """Return one token ``(B, 1, D)``; zero without numbers, for samples of ``like``."""
    if numbers is None:
        return torch.zeros_like(like[:, :1])
    return embed(numbers)[:, None]
