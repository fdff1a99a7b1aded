"""Words at every tile of the trained size, for transformers that join both (arXiv:2410.07536)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import ConfigError
from genscale.resolution.base import Patches, ResolutionOp, Sides


def tiled_words(words: Tensor, ids: Tensor, tiles: Sides, cells: Sides) -> tuple[Tensor, Tensor]:
    """Return words repeated once a tile, and their places moved to the tile's corner.

    Args:
        words: ``(B, L, D)``.
        ids: ``(L, 3)`` places of the words: one number apart, row, column.
        tiles: rows and columns of tiles.
        cells: height and width of a tile in tokens.

    Returns:
        ``(B, r c L, D)`` and ``(r c L, 3)``, tile after tile, row by row.
    """
    rows, columns = torch.meshgrid(
        torch.arange(tiles[0], device=ids.device) * cells[0],
        torch.arange(tiles[1], device=ids.device) * cells[1],
        indexing="ij",
    )
    corners = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1)
    places = (ids[None] + corners[:, None].to(ids)).flatten(0, 1)
    return words.repeat(1, len(corners), 1), places


def joins_words(model: nn.Module) -> bool:
    """Whether a network joins words to the picture's tokens, with places for both."""
    return hasattr(model, "context_embedder") and hasattr(model, "pos_embed")


class TextTiles(ResolutionOp):
    """Repeat the words of FLUX and its kind at every tile of the trained size (I-Max).

    Far tokens of a large picture are as near to some words as in training. Put it behind
    :class:`~genscale.resolution.entropy.EntropyAttention`, which then knows how many words there
    were in training.
    """

    def __init__(self) -> None:
        self._patches = Patches()

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """Hook the model's arguments; see :class:`ResolutionOp`."""
        tiles = math.ceil(target[0] / native[0]), math.ceil(target[1] / native[1])
        if not joins_words(model):
            raise ConfigError(
                f"{type(model).__name__} does not join words with places to the picture's tokens, "
                "as FLUX does, so that there is nothing to repeat. Use resolution=entropy."
            )
        cells: dict[int, Sides] = {}

        def repeat(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            names = ("encoder_hidden_states", "txt_ids", "img_ids")
            words, places, picture = (kwargs.get(name) for name in names)
            if words is None or places is None or picture is None:
                raise ConfigError(
                    f"{type(module).__name__} was called without the words or their places by "
                    "name. Call it as pipelines do: encoder_hidden_states=, txt_ids=, img_ids=."
                )
            picture = picture[0] if picture.dim() == 3 else picture
            if len(picture) not in cells:  # asked once: the answer waits for the device
                height, width = (int(side) + 1 for side in picture[:, 1:].amax(0).tolist())
                cells[len(picture)] = (
                    round(height * native[0] / target[0]),
                    round(width * native[1] / target[1]),
                )
            places = places[0] if places.dim() == 3 else places
            words, places = tiled_words(words, places, tiles, cells[len(picture)])
            return args, {**kwargs, "encoder_hidden_states": words, "txt_ids": places}

        self._patches.hook(model.register_forward_pre_hook(repeat, with_kwargs=True))

    def restore(self, model: nn.Module) -> None:
        """Remove the hook."""
        self._patches.undo()
