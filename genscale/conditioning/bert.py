"""The BERT encoder (arXiv:1810.04805), as far as sentence encoders need it: inference only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ours <- the published checkpoints' names
_RENAMED = (
    ("attention.self.query", "q"),
    ("attention.self.key", "k"),
    ("attention.self.value", "v"),
    ("attention.output.dense", "out"),
    ("attention.output.LayerNorm", "norm_1"),
    ("intermediate.dense", "up"),
    ("output.dense", "down"),
    ("output.LayerNorm", "norm_2"),
    ("encoder.layer.", "layers."),
    ("embeddings.word_embeddings", "words"),
    ("embeddings.position_embeddings", "positions"),
    ("embeddings.token_type_embeddings", "kinds"),
    ("embeddings.LayerNorm", "norm"),
)
_UNUSED = ("pooler.", "embeddings.position_ids")


class BertAttention(nn.Module):
    """x = LN(x + attention(x, context)).

    Args:
        hidden_size: width D.
        num_heads: attention heads.
        eps: of the norm.
        context_size: width of the context; None: D.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, eps: float, context_size: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.k = nn.Linear(context_size or hidden_size, hidden_size)
        self.v = nn.Linear(context_size or hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.norm_1 = nn.LayerNorm(hidden_size, eps=eps)

    def attend(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let tokens ``(B, N, D)`` look at a context.

        Args:
            x: the tokens.
            context: ``(B, M, context_size)``; the tokens themselves in self-attention.
            mask: bool ``(B, M)``, true for places that count; None counts all.
        """
        q, k, v = (
            each(of).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, N, d)
            for each, of in ((self.q, x), (self.k, context), (self.v, context))
        )
        seen = None if mask is None else mask[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.norm_1(x + self.out(y.transpose(1, 2).flatten(2)))


class BertLayer(BertAttention):
    """x = LN(x + attention(x)); x = LN(x + mlp(x)).

    Args:
        hidden_size: width D.
        num_heads: attention heads.
        inner_size: width inside the feed-forward part.
        eps: of the norms.
    """

    def __init__(self, hidden_size: int, num_heads: int, inner_size: int, eps: float) -> None:
        super().__init__(hidden_size, num_heads, eps)
        self.up = nn.Linear(hidden_size, inner_size)
        self.down = nn.Linear(inner_size, hidden_size)
        self.norm_2 = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Advance tokens ``(B, N, D)``."""
        return self.feed(self.attend(x, x))

    def feed(self, x: Tensor) -> Tensor:
        """Apply the feed-forward part."""
        return self.norm_2(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    """Token ids -> the last layer's states.

    Args:
        vocab_size: words of the tokenizer.
        hidden_size: width D.
        num_layers: layers.
        num_heads: attention heads.
        inner_size: width inside the feed-forward parts.
        max_tokens: rows of the position table.
        num_kinds: rows of the segment table, of which the first is used.
        eps: of the norms.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        inner_size: int,
        max_tokens: int = 512,
        num_kinds: int = 2,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(max_tokens, hidden_size)
        self.kinds = nn.Embedding(num_kinds, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.layers = nn.ModuleList(
            BertLayer(hidden_size, num_heads, inner_size, eps) for _ in range(num_layers)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Return ``(B, N, D)`` for the ids ``(B, N)`` int64 of texts of one length."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.positions(places) + self.kinds.weight[0])
        for layer in self.layers:
            x = layer(x)
        return x


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a published checkpoint's tensors by our names, without what is not used here."""
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("bert.")
        if key.startswith(_UNUSED):
            continue
        for theirs, ours in _RENAMED:
            key = key.replace(theirs, ours)
        renamed[key] = value.float()
    return renamed
