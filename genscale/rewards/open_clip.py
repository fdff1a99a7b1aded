"""Checkpoints of open_clip, read into the CLIP model of transformers.

Both compute the same function; open_clip keeps queries, keys and values in one tensor, multiplies
projections from the other side, and names things otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genscale.io.weights import assign_strictly, read_checkpoint


@dataclass(frozen=True, slots=True)
class OpenCLIPSizes:
    """Sizes of an open_clip model.

    Attributes:
        embedding_size: width of the common space.
        image_size: pixels of a side.
        patch_size: pixels of a patch's side.
        vision: width, layers and heads of the vision tower.
        text: width, layers and heads of the text tower.
        num_tokens: the most of a caption.
        vocab_size: words of the tokenizer.
    """

    embedding_size: int
    image_size: int
    patch_size: int
    vision: tuple[int, int, int]
    text: tuple[int, int, int]
    num_tokens: int = 77
    vocab_size: int = 49408


VIT_H_14 = OpenCLIPSizes(1024, 224, 14, (1280, 32, 16), (1024, 24, 16))

# open_clip -> transformers, inside a layer
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# outside; True: transposed
_REST = {
    "visual.class_embedding": ("vision_model.embeddings.class_embedding", False),
    "visual.positional_embedding": ("vision_model.embeddings.position_embedding.weight", False),
    "visual.conv1.weight": ("vision_model.embeddings.patch_embedding.weight", False),
    "visual.ln_pre.weight": ("vision_model.pre_layrnorm.weight", False),
    "visual.ln_pre.bias": ("vision_model.pre_layrnorm.bias", False),
    "visual.ln_post.weight": ("vision_model.post_layernorm.weight", False),
    "visual.ln_post.bias": ("vision_model.post_layernorm.bias", False),
    "visual.proj": ("visual_projection.weight", True),
    "token_embedding.weight": ("text_model.embeddings.token_embedding.weight", False),
    "positional_embedding": ("text_model.embeddings.position_embedding.weight", False),
    "ln_final.weight": ("text_model.final_layer_norm.weight", False),
    "ln_final.bias": ("text_model.final_layer_norm.bias", False),
    "text_projection": ("text_projection.weight", True),
    "logit_scale": ("logit_scale", False),
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_UNUSED = ("attn_mask",)  # the causal mask, which is computed


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an open_clip model's tensors under the names that transformers gives them.

    Keys that are not known stay as they are, for the strict load to name.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        key = key.removeprefix("module.")
        if key in _UNUSED:
            continue
        match = _BLOCK.fullmatch(key)
        if match is None:
            name, transposed = _REST.get(key, (key, False))
            renamed[name] = value.T if transposed and value.dim() == 2 else value
            continue
        tower = "vision_model" if match[1] else "text_model"
        layer = f"{tower}.encoder.layers.{match[2]}"
        if match[3] in ("attn.in_proj_weight", "attn.in_proj_bias") and len(value) % 3 == 0:
            end = match[3].removeprefix("attn.in_proj_")
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{part}_proj.{end}"] = tensor
            continue
        stem, _, end = match[3].rpartition(".")
        renamed[f"{layer}.{_LAYER.get(stem, stem)}.{end}"] = value
    return renamed


def build_clip(sizes: OpenCLIPSizes) -> nn.Module:
    """Build the CLIP model of transformers of these sizes, without drawing weights on "meta"."""
    from transformers import CLIPConfig, CLIPModel

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "projection_dim": sizes.embedding_size,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
        }

    vision = {"image_size": sizes.image_size, "patch_size": sizes.patch_size}
    text = {"vocab_size": sizes.vocab_size, "max_position_embeddings": sizes.num_tokens}
    # the end of a text is its largest number, as open_clip takes it
    text |= {"bos_token_id": sizes.vocab_size - 2, "eos_token_id": sizes.vocab_size - 1}
    config = CLIPConfig(
        text_config=tower(*sizes.text) | text,
        vision_config=tower(*sizes.vision) | vision,
        projection_dim=sizes.embedding_size,
    )
    model: nn.Module = CLIPModel(config)
    return model


def load_open_clip(path: Path, sizes: OpenCLIPSizes) -> nn.Module:
    """Read a checkpoint of open_clip in float32.

    Raises:
        CheckpointError: it is missing, damaged, or of another model.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    with torch.device("meta"):
        model = build_clip(sizes)
    hint = "Give the checkpoint of an open_clip ViT-H-14."
    assign_strictly(
        model, from_open_clip(tensors), device=torch.device("cpu"), source=path, hint=hint
    )
    for part in model.modules():  # numbers of places, which checkpoints need not hold
        places = getattr(part, "position_ids", None)
        if isinstance(places, Tensor) and places.is_meta:
            part.position_ids = torch.arange(places.shape[-1]).expand(1, -1)
    return model
