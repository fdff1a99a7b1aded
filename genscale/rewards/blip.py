"""BLIP's picture-grounded text encoder (arXiv:2201.12086): a ViT, and a BERT that looks at it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genscale.conditioning.bert import BertAttention, BertLayer, from_published
from genscale.layers.attention import SelfAttention
from genscale.layers.mlp import MLP

# ours <- the published checkpoints' names, of the ViT
_RENAMED = (
    (".norm1.", ".norm_1."),
    (".norm2.", ".norm_2."),
    (".attn.proj.", ".attn.out."),
    (".mlp.fc1.", ".mlp.up."),
    (".mlp.fc2.", ".mlp.down."),
    ("patch_embed.proj.", "patches."),
)


@dataclass(frozen=True, slots=True)
class BLIPSizes:
    """Sizes of a BLIP model.

    Attributes:
        image_size: pixels of a side.
        patch_size: pixels of a patch's side.
        vision: width, layers and heads of the ViT.
        text: width, layers and heads of the BERT; its feed-forward parts are four times as wide.
        vocab_size: words of the tokenizer, BLIP's two own ones included.
        max_tokens: rows of BERT's position table.
    """

    image_size: int
    patch_size: int
    vision: tuple[int, int, int]
    text: tuple[int, int, int]
    vocab_size: int
    max_tokens: int


BLIP_LARGE = BLIPSizes(224, 16, (1024, 24, 16), (768, 12, 12), 30524, 512)


class VisionBlock(nn.Module):
    """x += attention(LN(x)); x += mlp(LN(x)).

    Args:
        hidden_size: width D.
        num_heads: attention heads.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = SelfAttention(hidden_size, num_heads, qkv_bias=True)
        self.norm_2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = MLP(hidden_size, 4 * hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Advance tokens ``(B, N, D)``."""
        x = x + self.attn(self.norm_1(x))
        y: Tensor = self.mlp(self.norm_2(x))
        return x + y


class VisionEncoder(nn.Module):
    """Pictures -> tokens, that of the whole picture first.

    Args:
        sizes: of the model.
    """

    def __init__(self, sizes: BLIPSizes) -> None:
        super().__init__()
        width, layers, heads = sizes.vision
        num_patches = (sizes.image_size // sizes.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, width))
        self.patches = nn.Conv2d(3, width, sizes.patch_size, sizes.patch_size)
        self.blocks = nn.ModuleList(VisionBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return ``(B, N, D)`` of normalised pictures ``(B, 3, H, W)``."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1).to(x.dtype), x), dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed


class GroundedLayer(BertLayer):
    """A layer of BERT that looks at a picture between attention and feed-forward part.

    Args:
        hidden_size: width D.
        num_heads: attention heads.
        context_size: width of the picture's tokens.
    """

    def __init__(self, hidden_size: int, num_heads: int, context_size: int) -> None:
        super().__init__(hidden_size, num_heads, 4 * hidden_size, 1e-12)
        self.cross = BertAttention(hidden_size, num_heads, 1e-12, context_size)

    def forward(
        self, x: Tensor, picture: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Advance tokens ``(B, N, D)`` of texts.

        Args:
            x: the tokens.
            picture: tokens ``(B, M, context_size)`` of the pictures in sight; None: none is.
            mask: ``(B, N)`` bool, false for padding.
        """
        x = self.attend(x, x, mask)
        return self.feed(x if picture is None else self.cross.attend(x, picture))


class GroundedText(nn.Module):
    """Token ids and a picture's tokens -> states of the text.

    Args:
        sizes: of the model.
    """

    def __init__(self, sizes: BLIPSizes) -> None:
        super().__init__()
        width, layers, heads = sizes.text
        self.words = nn.Embedding(sizes.vocab_size, width)
        self.positions = nn.Embedding(sizes.max_tokens, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(
            GroundedLayer(width, heads, sizes.vision[0]) for _ in range(layers)
        )

    def forward(self, ids: Tensor, mask: Tensor, picture: Tensor) -> Tensor:
        """Return the last layer's states.

        Args:
            ids: ``(B, N)`` int64.
            mask: ``(B, N)`` bool, false for padding.
            picture: ``(B, M, context_size)``.

        Returns:
            ``(B, N, D)``.
        """
        places = torch.arange(ids.shape[1], device=ids.device)
        x: Tensor = self.norm(self.words(ids) + self.positions(places))
        for layer in self.layers:
            x = layer(x, picture, mask)
        return x


class BLIP(nn.Module):
    """Pictures and texts, seen together.

    Args:
        sizes: of the model.
    """

    def __init__(self, sizes: BLIPSizes) -> None:
        super().__init__()
        self.vision = VisionEncoder(sizes)
        self.text = GroundedText(sizes)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the state ``(B, D)`` of each text's first token in sight of its picture."""
        states: Tensor = self.text(ids, mask, self.vision(pixels))
        return states[:, 0]


def from_blip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a published BLIP by our names.

    The projections of its contrastive loss are left out. Keys that are not known stay as they
    are, for the strict load to name.
    """
    renamed, words = {}, {}
    for key, value in state.items():
        if key.startswith(("vision_proj.", "text_proj.")):
            continue
        if key.startswith("text_encoder."):
            key = key.removeprefix("text_encoder.")
            words[key.replace("crossattention.", "cross.attention.")] = value
            continue
        for theirs, ours in _RENAMED:
            key = key.replace(theirs, ours)
        renamed[key.replace("visual_encoder.", "vision.")] = value
    return renamed | {f"text.{key}": value for key, value in from_published(words).items()}
