"""Looking at attention from outside: its entropy by layer, and what words are looked at where."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from genscale.layers.cross_attention import CrossAttention
from genscale.layers.norm import upcast
from genscale.resolution.base import Patches, Sides
from genscale.resolution.entropy import attention_entropy

Seen = Callable[[str, Tensor, Tensor, Tensor | None, float], None]
"""Name of the module, queries, keys, mask, factor of the logits."""


class AttentionProbe(TorchFunctionMode):
    """Show every call of scaled_dot_product_attention, whoever makes it, and let it be.

    Queries are those that attention gets: normalised, rotated and scaled by whatever is put on
    the model at the time.

    Args:
        model: whose modules are named.
        seen: is called before every attention.
        only: modules of these kinds count as places; default the innermost module that runs.
    """

    def __init__(
        self, model: nn.Module, seen: Seen, only: tuple[type[nn.Module], ...] | None = None
    ) -> None:
        super().__init__()
        self.model, self.seen, self.only = model, seen, only
        self._patches = Patches()
        self._running: list[str] = []

    def __enter__(self) -> AttentionProbe:
        for name, module in self.model.named_modules():
            if self.only is None or isinstance(module, self.only):
                self._patches.hook(module.register_forward_pre_hook(self._begin(name)))
                self._patches.hook(module.register_forward_hook(self._end, always_call=True))
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._patches.undo()
        self._running.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Show what attention gets."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._running:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False))
            given.update(kwargs)
            q, k = given["query"], given["key"]
            scale = given.get("scale")
            factor = 1.0 if scale is None else float(scale) * math.sqrt(q.shape[-1])
            self.seen(self._running[-1], q, k, given.get("attn_mask"), factor)
        return func(*args, **kwargs)

    def _begin(self, name: str) -> Callable[..., None]:
        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._running.append(name)

        return begin

    def _end(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self._running.pop()


def entropies_by_layer(model: nn.Module, call: Callable[[], Any]) -> dict[str, float]:
    """Return the mean entropy in nats of the attention of every layer, over all that ``call`` does.

    Masked attention is left out: its rows have numbers of keys of their own.

    Args:
        model: the network.
        call: calls it, once or more.
    """
    found: dict[str, list[Tensor]] = {}

    def seen(name: str, q: Tensor, k: Tensor, mask: Tensor | None, factor: float) -> None:
        if mask is None:
            with torch.no_grad():
                found.setdefault(name, []).append(attention_entropy(q, k, factor).mean())

    with AttentionProbe(model, seen):
        call()
    return {name: torch.stack(values).mean().item() for name, values in found.items()}


class WordMaps(AttentionProbe):
    """Gather how much attention every word gets in every place, over all layers and calls.

    Only the first B rows of a batch are looked at, where guidance puts the condition's own.

    Args:
        model: the network.
        grid: height and width of its input; tokens are a grid of the same proportions.
    """

    def __init__(self, model: nn.Module, grid: Sides) -> None:
        super().__init__(model, self._add, (CrossAttention,))
        self.grid = grid
        self._total: Tensor | None = None
        self._count = 0

    def mean(self, batch: int) -> Tensor | None:
        """Return the maps ``(B, M, h, w)`` float32 of ``batch`` samples; None: nothing was seen."""
        if self._total is None:
            return None
        cells = self._total.shape[1]
        height = round(math.sqrt(cells * self.grid[0] / self.grid[1]))
        maps = self._total[:batch] / self._count
        return maps.transpose(1, 2).unflatten(-1, (height, cells // height))

    def _add(self, name: str, q: Tensor, k: Tensor, mask: Tensor | None, factor: float) -> None:
        with torch.no_grad():
            logits = upcast(q) @ upcast(k).transpose(-1, -2) * (factor / math.sqrt(q.shape[-1]))
            if mask is not None:
                logits = logits.masked_fill(~mask, -math.inf)
            maps = logits.softmax(dim=-1).mean(dim=1)  # (B', N, M)
            if self._total is not None and self._total.shape == maps.shape:
                maps = maps + self._total
            elif self._total is not None:  # guidance that rests calls fewer rows
                rows = min(len(maps), len(self._total))
                maps = maps[:rows] + self._total[:rows]
            self._total = maps
            self._count += 1
