"""The README.md that lies beside exported weights: what they are, their settings, how to load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from genscale.backbones.base import Backbone, parameter_count


def model_card(
    model: Backbone, config: Mapping[str, Any], *, origin: str, use: str, notes: Sequence[str] = ()
) -> str:
    """Write a model card; it makes no claim about quality, which needs a protocol.

    Args:
        model: the network.
        config: the parts that sampling needs, each with its settings.
        origin: where the weights came from, a sentence.
        use: code or a command that loads the folder.
        notes: what a user must know besides, a sentence each.
    """
    shape = model.sample_shape
    name = type(model).__name__
    lines = [
        f"# {name}",
        "",
        f"{parameter_count(model):,} parameters, {config['data_info'].get('num_classes') or 'no'} "
        f"classes, inputs of {' x '.join(map(str, shape))}. {origin}",
        "",
        "```",
        use,
        "```",
        "",
        *(f"- {note}" for note in notes),
        *([""] if notes else []),
        "Settings:",
        "",
        "```json",
        json.dumps({key: config[key] for key in config if key != "data_info"}, indent=2),
        "```",
        "",
        "Quality is not stated here: a number needs the protocol it was measured under. The "
        "weights keep the licence of the data and of the program they came from.",
    ]
    return "\n".join(lines) + "\n"
