"""What the networks that predict scale by scale share: their input, their attention, their head.

A scale-wise transformer (arXiv:2404.02905) reads, for the tokens of scale k, the running latent
resized to that scale; the tokens of scale 0, where nothing is known, read the condition. Everything
that a condition gives a network is computed in ``begin`` once a sample, and lies in the memory that
goes from scale to scale. No table over pairs of tokens exists: attention runs once a scale.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genscale.backbones.base import ScaleBackbone, ScaleOutput
from genscale.backbones.shapes import class_rows
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.attention import attend
from genscale.layers.norm import no_autocast, per_sample, upcast
from genscale.layers.position_tables import resize_scale_table
from genscale.layers.scale_cache import cache_dtype, write
from genscale.layers.scales import Scales, as_scales, scale_spans

Spans = Sequence[tuple[int, int]]
"""First token of every scale, and the one after its last, in the row of all tokens."""

LogitFactors = Callable[[Spans], Sequence[float]]
"""From scales to a factor each."""


class ScaleEmbedding(nn.Module):
    """From running latents to tokens: a linear layer, a vector a level and one a place.

    All in float32. The tokens of scale 0 are the start vector, which is given, plus a learned one.

    Args:
        scales: height and width of every scale.
        latent_channels: channels Cv of the running latent.
        hidden_size: width D.
        positions: give every place of every scale a learned vector.
    """

    def __init__(
        self, scales: Scales, latent_channels: int, hidden_size: int, *, positions: bool = True
    ) -> None:
        super().__init__()
        self.spans = scale_spans(scales)
        self.word = nn.Linear(latent_channels, hidden_size)
        self.level = nn.Embedding(len(scales), hidden_size)
        self.start = nn.Parameter(torch.empty(self.spans[0][1], hidden_size))
        self.places = (
            nn.Parameter(torch.empty(self.spans[-1][1], hidden_size)) if positions else None
        )

    def at(self, trained: Scales, scales: Scales) -> ScaleEmbedding:
        """Return this embedding for other scales than the trained ones; weights are shared.

        Vectors of places are stretched inside each scale. Scales beyond the trained ones have the
        level and the places of the last of those.
        """
        other = copy.copy(self)
        other._parameters = dict(self._parameters)
        other.spans = scale_spans(scales)
        tables = {"start": (self.start, 1), "places": (self.places, len(trained))}
        for name, (table, count) in tables.items():
            if table is not None:
                wanted = scales[:1] if name == "start" else scales
                stretched = resize_scale_table(table.detach(), trained[:count], wanted)
                setattr(other, name, nn.Parameter(stretched, table.requires_grad))
        return other

    def forward(self, features: Tensor, start: Tensor, scales: range) -> Tensor:
        """Embed the tokens of consecutive scales.

        Args:
            features: ``(B, N, Cv)``; rows of scale 0 are not read.
            start: ``(B, D)`` what the tokens of scale 0 know.
            scales: which scales the rows belong to.

        Returns:
            ``(B, N, D)`` float32.
        """
        spans, last = [self.spans[k] for k in scales], self.level.num_embeddings - 1
        with no_autocast(features.device):
            weight = upcast(self.word.weight)
            unknown = spans[0][1] if scales[0] == 0 else 0
            x = F.linear(features[:, unknown:].to(weight.dtype), weight, upcast(self.word.bias))
            if unknown:
                opening = upcast(start)[:, None] + upcast(self.start)
                x = torch.cat((opening, x), dim=1)
            levels = [
                self.level.weight[min(k, last)].expand(end - begin, -1)
                for k, (begin, end) in zip(scales, spans, strict=True)
            ]
            table = upcast(torch.cat(levels))
            if self.places is not None:
                table = table + upcast(self.places[spans[0][0] : spans[-1][1]])
            return x + table


class ScaleHead(nn.Module):
    """Logits of all codes from tokens, through a norm that a condition scales and shifts.

    All in float32: (1 + scale) LN(x) + shift, then a linear layer.

    Args:
        hidden_size: width D.
        vocab_size: codes V.
        eps: added to the variance.
    """

    def __init__(self, hidden_size: int, vocab_size: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, vocab_size)

    def modulate(self, condition: Tensor) -> Tensor:
        """Return scale and shift ``(B, 2, D)`` float32 of a condition ``(B, D)``."""
        with no_autocast(condition.device):
            c = F.silu(upcast(condition))
            weight, bias = upcast(self.modulation.weight), upcast(self.modulation.bias)
            return F.linear(c, weight, bias).unflatten(-1, (2, -1))

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        """Return logits ``(B, N, V)`` float32 of tokens ``(B, N, D)``."""
        with no_autocast(x.device):
            scale, shift = upcast(vectors).unbind(1)
            y = F.layer_norm(upcast(x), x.shape[-1:], eps=self.eps)
            y = y * (1 + per_sample(scale, y)) + per_sample(shift, y)
            return F.linear(y, upcast(self.out.weight), upcast(self.out.bias))


def attend_by_scale(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    *,
    prefix: bool,
    scale: float | None = None,
    factors: LogitFactors | None = None,
) -> Tensor:
    """Attend scale by scale, to whole scales.

    Args:
        q: ``(B, h, N, d)`` queries of the tokens of ``spans``.
        k: ``(B, h, M, d)`` keys: with ``prefix`` of all tokens from the first one on, else of the
            same tokens as the queries.
        v: values of the same tokens as the keys.
        spans: of consecutive scales.
        prefix: a scale sees all scales up to itself; else itself alone.
        scale: factor of the logits; None is 1 / sqrt(d).
        factors: further factors of the logits by scale, where there are any.

    Returns:
        ``(B, h, N, d)``.
    """
    base = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    scales = [scale] * len(spans)
    if factors is not None:
        scales = [base * factor for factor in factors(spans)]
    sizes = [end - begin for begin, end in spans]
    if prefix:
        seen = [(k[:, :, :end], v[:, :, :end]) for _, end in spans]
    else:
        seen = list(zip(k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True))
    parts = [
        attend(query, *pair, scale=factor)
        for query, pair, factor in zip(q.split(sizes, dim=2), seen, scales, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class ScaleAttention(nn.Module):
    """Self-attention by scale, as VAR and M-VAR have it; keys have no bias.

    Args:
        hidden_size: width D.
        num_heads: heads h; D must be a multiple of it.
        l2_norm: logits are a cosine times a factor that every head learns, 100 at most; without
            it they are q k / (4 sqrt(d)).
        prefix: a scale sees all scales up to itself; else itself alone.
    """

    MAX_LOG_FACTOR = math.log(100.0)
    logit_factors: LogitFactors | None = None  # set for a while by resolution scaling

    def __init__(self, hidden_size: int, num_heads: int, *, l2_norm: bool, prefix: bool) -> None:
        super().__init__()
        self.num_heads, self.prefix = num_heads, prefix
        self.scale = 1.0 if l2_norm else 0.25 / math.sqrt(hidden_size // num_heads)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.empty(hidden_size))
        self.v_bias = nn.Parameter(torch.empty(hidden_size))
        self.log_factor = nn.Parameter(torch.empty(num_heads)) if l2_norm else None
        self.out = nn.Linear(hidden_size, hidden_size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start without biases and at logits of 4 times the cosine."""
        self.q_bias.zero_()
        self.v_bias.zero_()
        if self.log_factor is not None:
            self.log_factor.fill_(math.log(4.0))

    def forward(self, x: Tensor, spans: Spans, slot: dict[str, Any] | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``(B, N, D)`` tokens of ``spans``.
            spans: of consecutive scales; with ``prefix``, from the first one on or with a slot.
            slot: this layer's part of a cache (``keys`` and ``values``, lists of one), into which
                new keys and values are written.
        """
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, N, d)
            for part in qkv.chunk(3, dim=-1)
        )
        if self.log_factor is not None:
            factor = upcast(self.log_factor).clamp(max=self.MAX_LOG_FACTOR).exp()
            # back to the type of v: a cache in float32 would be half as fast and twice as large
            q = (F.normalize(upcast(q), dim=-1) * factor[:, None, None]).to(v.dtype)
            k = F.normalize(upcast(k), dim=-1).to(v.dtype)
        if slot is not None:
            k, v = write(slot, 0, spans[0][0], k, v)
        y = attend_by_scale(
            q, k, v, spans, prefix=self.prefix, scale=self.scale, factors=self.logit_factors
        )
        return self.out(y.transpose(1, 2).flatten(2))


def gated_sum(x: Tensor, gate: Tensor, y: Tensor, *, drop_path: float = 0.0) -> Tensor:
    """Return x + gate y in the type of ``x``; some samples may drop y.

    Args:
        x: ``(B, N, D)``.
        gate: ``(B, D)``.
        y: ``(B, N, D)``.
        drop_path: probability with which a sample's y is dropped; kept ones are enlarged, so
            that the mean stays (arXiv:1603.09382). Drawn from torch's own generator.
    """
    if drop_path > 0:
        kept = torch.empty(len(x), 1, device=x.device).bernoulli_(1 - drop_path)
        gate = gate * (kept / (1 - drop_path))
    return x + (per_sample(gate, y) * y).to(x.dtype)


class ScaleTransformer(ScaleBackbone):
    """The walk of a scale-wise transformer: embed, blocks, head.

    A subclass sets ``embed``, ``blocks``, ``head`` and ``gradient_checkpointing``, gives the start
    vectors of conditions, and runs its blocks under teacher forcing and for one scale. Memory
    holds at least ``start`` ``(B, D)`` and ``head`` ``(B, 2, D)``.
    """

    _supports_gradient_checkpointing = True

    embed: ScaleEmbedding
    blocks: nn.ModuleList
    head: ScaleHead
    gradient_checkpointing: bool

    def forward(  # type: ignore[override]  # scales stand in the place of time
        self,
        features: Tensor,
        cond: Conditioning,
        scales: range | None = None,
        memory: Any = None,
    ) -> ScaleOutput:
        """Predict the tokens of consecutive scales; see :class:`ScaleBackbone`."""
        scales = self.scales_of(features, scales, stepping=memory is not None)
        if memory is None:
            start = self.start_vectors(cond, len(features), features.device)
            x = self.teach(self._tokens(features, start, scales), start, cond, scales)
            return ScaleOutput(self.head(x, self.head.modulate(start)))
        x = self._tokens(features, memory["start"], scales)
        x, memory = self.advance(x, scales[0], memory)
        return ScaleOutput(self.head(x, memory["head"]), memory)

    def start_vectors(self, cond: Conditioning, batch: int, device: torch.device) -> Tensor:
        """Return ``(B, D)`` what the first tokens and the head know of a condition."""
        raise NotImplementedError(f"{type(self).__name__} must implement start_vectors")  # abstract

    def teach(self, x: Tensor, start: Tensor, cond: Conditioning, scales: range) -> Tensor:
        """Run the blocks on all scales up to one, each seeing what it sees in sampling."""
        raise NotImplementedError(f"{type(self).__name__} must implement teach")  # abstract

    def advance(self, x: Tensor, scale: int, memory: Any) -> tuple[Tensor, Any]:
        """Run the blocks on one scale and return the memory for the next."""
        raise NotImplementedError(f"{type(self).__name__} must implement advance")  # abstract

    def at_scales(self, scales: Sequence[int | Sequence[int]]) -> Self:
        """Return this network for other scales; see :class:`ScaleBackbone`.

        Raises:
            ConfigError: scales that do not grow.
        """
        other = copy.copy(self)
        other._modules = dict(self._modules)  # parts are shared, but for the embedding
        other.embed = self.embed.at(self.scales, as_scales(scales))
        other.register_to_config(scales=plain_scales(scales))
        return other

    def scales_of(self, features: Tensor, scales: range | None, *, stepping: bool) -> range:
        """Return which scales features belong to.

        Raises:
            ValueError: they do not fit the scales, or scales that cannot be asked for.
        """
        spans, channels = self.embed.spans, self.config["latent_channels"]
        if features.dim() != 3 or features.shape[2] != channels:
            raise ValueError(
                f"{type(self).__name__} takes features of shape (B, N, {channels}), but "
                f"{tuple(features.shape)} was given. Give running latents resized to every scale."
            )
        if scales is None:
            ends = [end for _, end in spans]
            if features.shape[1] not in ends:
                raise ValueError(
                    f"Features must end with a scale, after one of {ends} tokens, but "
                    f"{features.shape[1]} were given. Cut them at a scale."
                )
            scales = range(ends.index(features.shape[1]) + 1)
        allowed = len(scales) == 1 if stepping else len(scales) > 0 and scales[0] == 0
        if not allowed or scales.step != 1 or scales[0] < 0 or scales[-1] >= len(spans):
            wanted = "one scale with memory" if stepping else "consecutive scales from 0 on"
            raise ValueError(
                f"{type(self).__name__} predicts {wanted}, of {len(spans)}, but {scales} was asked "
                "for. Go scale by scale with the memory of begin, or give all scales from the "
                "first without memory."
            )
        count = spans[scales[-1]][1] - spans[scales[0]][0]
        if features.shape[1] != count:
            raise ValueError(
                f"{scales} has {count} tokens, but features have {features.shape[1]}. "
                "Give one row a token."
            )
        return scales

    def run_block(self, block: nn.Module, *inputs: Any, random: bool = False) -> Tensor:
        """Run a block of :meth:`teach`, which may be recomputed in the backward pass.

        Args:
            block: the module.
            inputs: its arguments.
            random: it draws random numbers.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            y: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=random)
            return y
        result: Tensor = block(*inputs)
        return result

    def _tokens(self, features: Tensor, start: Tensor, scales: range) -> Tensor:
        x: Tensor = self.embed(features, start, scales)
        return x.to(cache_dtype(x.device, self.embed.word.weight))


def plain_scales(scales: Sequence[int | Sequence[int]]) -> list[int | list[int]]:
    """Return scales as a config keeps them: sides of squares, and ``[height, width]``.

    Raises:
        ConfigError: no list of scales that grow.
    """
    return [h if h == w else [h, w] for h, w in as_scales(scales)]


class ClassTable(nn.Embedding):
    """A vector a class, and one, the last, for the null class; read in float32.

    Args:
        num_classes: K; 0 leaves the null class alone.
        hidden_size: width D.
    """

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__(num_classes + 1, hidden_size)
        self.num_classes = num_classes

    def look_up(self, labels: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Return ``(B, D)`` float32 of labels ``(B,)``; -1 and missing labels mean the null class.

        Raises:
            ValueError: another number of labels than samples.
        """
        if not self.num_classes:
            labels = None
        if labels is not None and labels.shape != (batch,):
            raise ValueError(
                f"cond.labels must have shape ({batch},), but has {tuple(labels.shape)}. "
                "Give one label a sample."
            )
        labels = None if labels is None else labels.to(device)
        rows = class_rows(labels, self.num_classes, batch, device)
        return upcast(F.embedding(rows, self.weight))


def check_drop_path(rate: float) -> None:
    """Check that a rate of dropped paths is one.

    Raises:
        ConfigError: it is not.
    """
    if not 0 <= rate < 1:
        raise ConfigError(
            f"model.drop_path must lie in [0, 1), but is {rate}. The published choice is "
            "0.1 * depth / 24, or 0 for none."
        )


@torch.no_grad()
def start_weights(model: ScaleTransformer, hidden_size: int) -> None:
    """Draw a network's weights anew as VAR starts them, up to what a block scales itself.

    Every linear layer, table and position is normal with variance 1 / (3 D), cut off at 2; biases
    are zero. The head is then 0.02 times as large, its modulation half.

    Args:
        model: the network; its convolutions and what has no weight are not touched.
        hidden_size: width D.
    """
    std = math.sqrt(1 / (3 * hidden_size))

    def draw(weight: Tensor) -> None:
        nn.init.trunc_normal_(weight, std=std, a=-2, b=2)

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            draw(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, ScaleAttention):
            module.reset_parameters()
    draw(model.embed.start)
    if model.embed.places is not None:
        draw(model.embed.places)
    model.head.out.weight.mul_(0.02)
    model.head.modulation.weight.mul_(0.5)


def spared_by_decay(model: ScaleTransformer) -> set[str]:
    """Name biases, vectors, positions, levels and offsets, which VAR's recipe does not decay."""
    tables = {"embed.start", "embed.places", "embed.level.weight"}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 or name in tables or name.endswith(".offsets")
    }
