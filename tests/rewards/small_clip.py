"""Folders of small CLIP models of random weights, as the transformers library writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ("<pad>", "<unk>", "red", "blue", "circle", "two", "<begin>", "<end>")
CAPTIONS = ("two red circle", "blue")
TOKENS = ((6, 5, 2, 4, 7), (6, 3, 7))  # of the captions
IMAGE_SIZE = 16


def write_tokenizer(folder: Path) -> Any:
    """Write a tokenizer that knows eight words."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    own = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 6), ("<end>", 7)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    made.save_pretrained(folder)
    return made


def write_clip(folder: Path) -> Any:
    """Write a CLIP model with its tokenizer, and return the model."""
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 6, "pad_token_id": 0}
    text |= {"bos_token_id": 6, "eos_token_id": 7}
    config = transformers.CLIPConfig(
        text_config=tower | text,
        vision_config=tower | {"image_size": IMAGE_SIZE, "patch_size": 4},
        projection_dim=6,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPModel(config).eval()
        for parameter in model.parameters():  # initial weights are so small that scores agree
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def pictures(count: int, side: int = 24, seed: int = 0) -> torch.Tensor:
    """Return smooth pictures in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return fine.clamp(0, 1)
