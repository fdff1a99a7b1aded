"""Attention whose entropy stays that of training when there are more or fewer tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genscale.backbones.base import Backbone, ScaleBackbone
from genscale.backbones.causal_video import CausalVideo
from genscale.backbones.causal_video_block import VideoAttention
from genscale.backbones.fit_layers import Attention
from genscale.backbones.rin import RINBlock
from genscale.backbones.scale_wise import LogitFactors, ScaleAttention
from genscale.backbones.switti_block import NormedScaleAttention
from genscale.errors import ConfigError
from genscale.layers.attention import SelfAttention
from genscale.layers.norm import upcast
from genscale.layers.scales import scale_spans
from genscale.resolution.base import Patches, ResolutionOp, Sides, extra_tokens


def entropy_factor(tokens: float, trained: float) -> float:
    """Return lam = sqrt(log N / log T), the factor of the logits (arXiv:2306.08645).

    The entropy of a row of attention grows like log N, and falls with the square of the logits'
    scale: lam keeps it. Above 1 for more tokens than in training; 1 where either number is at
    most 1.

    Args:
        tokens: N, keys a query sees now.
        trained: T, keys it saw in training.
    """
    if tokens <= 1 or trained <= 1:
        return 1.0
    return math.sqrt(math.log(tokens) / math.log(trained))


def attention_entropy(q: Tensor, k: Tensor, factor: float = 1.0) -> Tensor:
    """Return the entropy in nats of every row of softmax(factor q k^T / sqrt(d)).

    Args:
        q: ``(..., N, d)``.
        k: ``(..., M, d)``.
        factor: of the logits.

    Returns:
        ``(..., N)``, between 0 and log M.
    """
    logits = upcast(q) @ upcast(k).transpose(-1, -2) * (factor / math.sqrt(q.shape[-1]))
    logs = logits.log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1)


@dataclass(slots=True)
class ResolutionState:
    """What a forward pass tells its layers of the size it works at.

    Attributes:
        shrink: trained area over the present one: T / N of tokens of the picture.
        image_tokens: tokens of the picture in layers that join them with others (a class, words),
            as far as this forward has told; None before, and in networks without such layers.
        fixed_extras: tokens that are no part of the picture, where a network has a fixed number.
        words: words the network was called with, where it joins them to the picture's tokens:
            there were as many in training, whatever an operator makes of them afterwards.
    """

    shrink: float
    image_tokens: int | None = None
    fixed_extras: int = 0
    words: int | None = None

    def factor(self, tokens: int, extras: int | None = None) -> float:
        """Return lam of a layer with ``tokens`` keys, ``extras`` of them not of the picture."""
        if extras is None:
            extras = self.fixed_extras
            if self.image_tokens is not None:
                extras = max(tokens - self.image_tokens, extras)
        trained = extras if self.words is None else min(extras, self.words)
        return entropy_factor(tokens, (tokens - extras) * self.shrink + trained)


class EntropyAttention(ResolutionOp):
    """Scale the logits of self-attention by :func:`entropy_factor`, by scaling its queries.

    Logits are linear in the queries, and so are rotary positions: a factor on the queries behind
    their norm is a factor on the logits, whatever computes the attention. (``attn.scale`` of
    diffusers is not read by processors that call scaled_dot_product_attention.)

    The factor follows every forward's own number of tokens. Joint attention counts words in both
    numbers; attention to words alone is left as it is, its keys being as many as in training.

    Args:
        unit: lengths, in the unit of ``native``, along one side of a cell of the model's input (of
            a token, where the input is a sequence); the factor then follows the size of each
            input. 1 for backbones. Default None: 1 for backbones of this package, and for others
            every input counts as one of the target size.
    """

    def __init__(self, unit: float | None = None) -> None:
        self.unit = unit
        self._patches = Patches()

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """Hook the queries of all self-attention layers; see :class:`ResolutionOp`."""
        area = math.prod(native)
        state = ResolutionState(area / math.prod(target))
        own = isinstance(model, Backbone)
        unit = 1.0 if self.unit is None and own else self.unit

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            x = kwargs.get("hidden_states", kwargs.get("sample", x))
            if x is None:
                return
            cells = x.shape[1] if x.dim() == 3 else math.prod(x.shape[-2:])
            if unit is not None:
                state.shrink = area / (cells * unit**2)
            state.image_tokens = cells if x.dim() == 3 else None
            words = None if own else kwargs.get("encoder_hidden_states")
            state.words = None if words is None else words.shape[1]

        self._patches.hook(model.register_forward_pre_hook(begin, with_kwargs=True))
        before = len(self._patches)
        if own:
            state.fixed_extras = extra_tokens(model)
        by_scale = _by_scale(model, target) if isinstance(model, ScaleBackbone) else None
        video = _video_factor(model, native, target) if isinstance(model, CausalVideo) else 1.0
        for module in model.modules():
            if isinstance(module, SelfAttention):
                _hook_own(module, state, self._patches)
            elif isinstance(module, ScaleAttention | NormedScaleAttention) and by_scale:
                self._patches.method(module, "logit_factors", by_scale(module.prefix))
            elif isinstance(module, RINBlock):
                _hook_reading(module.read, state, self._patches)
            elif isinstance(module, VideoAttention):
                scale = _scaling([video], third=False)
                self._patches.hook(module.q_norm.register_forward_hook(scale))
            elif not own and _is_attention(module):
                _hook_attention(module, state, self._patches)
        if len(self._patches) == before:
            raise ConfigError(
                f"The entropy of attention cannot be kept in {type(model).__name__}: it needs "
                "softmax self-attention over the tokens of one picture, which this model has not. "
                "Use resolution=none, or an operator on samples."
            )

    def restore(self, model: nn.Module) -> None:
        """Remove the hooks."""
        self._patches.undo()


def _hook_own(layer: SelfAttention, state: ResolutionState, patches: Patches) -> None:
    """Scale the logits of a layer of this package."""
    if layer.qk_norm is None:

        def scale_queries(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            return _scale_third(out, state.factor(out.shape[1]))

        patches.hook(layer.qkv.register_forward_hook(scale_queries))
        return

    def scale_both(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        # one norm serves queries and keys: either gets the root of the factor
        return out * math.sqrt(state.factor(out.shape[2]))

    patches.hook(layer.qk_norm.register_forward_hook(scale_both))


def _by_scale(model: ScaleBackbone, target: Sides) -> Callable[[bool], LogitFactors]:
    """Return, for layers that see earlier scales or do not, the factor of every scale.

    A scale is compared with that of the same number in training, so that one factor serves all
    that is cached.
    """
    now, before = (scale_spans(m.scales) for m in (model.at_size(*target), model))

    def factors(prefix: bool) -> LogitFactors:
        def seen(span: tuple[int, int]) -> int:
            return span[1] if prefix else span[1] - span[0]

        known = {
            tuple(span): entropy_factor(seen(span), seen(before[min(k, len(before) - 1)]))
            for k, span in enumerate(now)
        }
        # scales of another size than the target's are left as they are
        return lambda spans: [known.get(tuple(span), 1.0) for span in spans]

    return factors


def _hook_reading(read: Attention, state: ResolutionState, patches: Patches) -> None:
    """Scale what latents look for among patches; what they write back has as many keys as ever."""
    current = [1.0]

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        current[0] = state.factor(args[1].shape[1], 0)

    patches.hook(read.register_forward_pre_hook(look))
    where = read.q if read.q_norm is None else read.q_norm
    patches.hook(where.register_forward_hook(_scaling(current, third=False)))


def _video_factor(model: CausalVideo, native: Sides, target: Sides) -> float:
    """Return one factor for all frames, that of the trained length: a cache may grow beside it."""
    frames, cell = model.sample_shape[1], math.prod(model.size_step)
    return entropy_factor(frames * math.prod(target) / cell, frames * math.prod(native) / cell)


def _is_attention(module: nn.Module) -> bool:
    """Whether a module is built as diffusers builds attention layers."""
    names = ("to_q", "to_qkv", "norm_q")
    return any(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _hook_attention(layer: nn.Module, state: ResolutionState, patches: Patches) -> None:
    """Scale the queries of an attention layer of diffusers behind their norm."""
    current = [1.0]

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        current[0] = _layer_factor(module, args, kwargs, state)

    patches.hook(layer.register_forward_pre_hook(look, with_kwargs=True))
    for norm, plain, fused in (
        ("norm_q", "to_q", "to_qkv"),
        ("norm_added_q", "add_q_proj", "to_added_qkv"),
    ):
        where = getattr(layer, norm, None)
        if isinstance(where, nn.Module):
            patches.hook(where.register_forward_hook(_scaling(current, third=False)))
            continue
        for name in (plain, fused):  # only one of the two is called
            where = getattr(layer, name, None)
            if isinstance(where, nn.Module):
                patches.hook(where.register_forward_hook(_scaling(current, third=name == fused)))


def _scaling(current: list[float], *, third: bool) -> Callable[..., Tensor]:
    def scale(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if current[0] == 1.0:
            return out
        return _scale_third(out, current[0]) if third else out * current[0]

    return scale


def _scale_third(qkv: Tensor, factor: float) -> Tensor:
    """Scale the queries, the first third of the channels."""
    if factor == 1.0:
        return qkv
    q, rest = qkv.split([qkv.shape[-1] // 3, qkv.shape[-1] // 3 * 2], dim=-1)
    return torch.cat((q * factor, rest), dim=-1)


def _layer_factor(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: ResolutionState
) -> float:
    """Return the factor of one call of an attention layer of diffusers."""
    given = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False))
    given.update(kwargs)
    x, words = given["hidden_states"], given.get("encoder_hidden_states")
    tokens = math.prod(x.shape[2:]) if x.dim() == 4 else x.shape[1]
    if words is None:
        return state.factor(tokens)
    joint = any(
        isinstance(getattr(layer, name, None), nn.Module) for name in ("add_q_proj", "to_added_qkv")
    )
    # layers that join both sequences before one projection take words of their own width
    if not joint and getattr(layer, "is_cross_attention", True):
        return 1.0  # attention to words alone
    state.image_tokens = tokens  # layers further on join both into one sequence
    return state.factor(tokens + words.shape[1], words.shape[1])
