"""What a text encoder has to do in a training run, and whether it, the model and the data agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from genscale.cli.app import instantiate
from genscale.cli.combinations import model_setting

if TYPE_CHECKING:
    from genscale.conditioning.text import TextEncoder
    from genscale.text_cache import TextCache

_SIZES = ("text_size", "num_text_tokens", "pooled_text_size")
_EXAMPLES = 16  # captions kept in a run's config
_PROBES = 500  # captions read to check those that a program writes


def text_sizes(model: DictConfig) -> dict[str, int]:
    """Return a model node's sizes of text, its constructor's defaults included; 0 for none."""
    return {name: model_setting(model, name) or 0 for name in _SIZES}


def text_cache(cfg: DictConfig) -> TextCache | None:
    """Build the encoder of captions, where the model reads text; weights are not read yet."""
    from genscale.conditioning.text import reads_text
    from genscale.text_cache import TextCache

    if not reads_text(text_sizes(cfg.model)):
        return None
    return TextCache(instantiate(cfg.text_encoder, "text_encoder"))


def pairing_problems(model: DictConfig, encoder: TextEncoder) -> list[str]:
    """Return a sentence where a model and a text encoder do not go together.

    Args:
        model: the model's node; it is not built.
        encoder: the encoder, or :class:`~genscale.conditioning.text.NoText`.
    """
    from genscale.conditioning.text import NoText, fit_problems, reads_text

    sizes = text_sizes(model)
    encodes, reads = not isinstance(encoder, NoText), reads_text(sizes)
    if reads and not encodes:
        return [
            f"The model reads text (model.text_size={sizes['text_size']}, model.pooled_text_size="
            f"{sizes['pooled_text_size']}), but text_encoder=none encodes none. Give "
            "text_encoder=minilm, or text_encoder=words, which needs no weights."
        ]
    if encodes and not reads:
        return [
            f"text_encoder={encoder.name} was given, but the model reads no text. Leave it out, or "
            "choose a model that reads text, e.g. model=dit_text."
        ]
    return fit_problems(sizes, encoder) if reads else []


def caption_problems(encoder: TextEncoder, datamodule: Any) -> list[str]:
    """Return a sentence where data has no captions, or one that cannot be encoded.

    Args:
        encoder: of a model that reads text.
        datamodule: built from the config.
    """
    captions = datamodule.train.captions
    if captions is None:
        return [
            f"The model reads captions, but data '{datamodule.name}' has none. Choose data with "
            "captions, or a model that reads class labels."
        ]
    problems = encoder.check()
    if problems:
        return problems
    for part in (datamodule.train, datamodule.heldout):
        if part is not None and part.captions is not None:
            captions = part.captions
            if not isinstance(captions, list | tuple):  # written when asked for, by a program
                captions = [captions[i] for i in range(min(len(captions), _PROBES))]
            problem = encoder.prompt_problem(captions, what=f"In '{part.name}', caption")
            if problem is not None:
                return [problem]
    return []


def example_captions(datamodule: Any) -> list[str] | None:
    """Return a few captions of held-out pictures, or of others; None where there are none."""
    from genscale.prompts import distinct

    shown = datamodule.heldout or datamodule.train
    return None if shown.captions is None else distinct(shown.captions, _EXAMPLES)
