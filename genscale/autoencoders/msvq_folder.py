"""Folders of trained multi-scale tokenizers: found, and told about without their weights.

Loads no torch: configs are composed with what is read here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genscale.autoencoders.diffusers_folder import WEIGHTS, read_config
from genscale.errors import CheckpointError

KEY = "autoencoder.run"
HOW = "Train one with: python train.py model=msvq data=<data>"

# where the weights lie: in an exported model, an exported folder, a run
_INSIDE = (".", "model", "export/model", "export")


def locate_tokenizer(run: str) -> Path:
    """Return the folder that holds config and weights of a tokenizer.

    Args:
        run: the folder itself, an exported folder, or a run of ``model=msvq``.

    Raises:
        CheckpointError: there is none, or it is of another model.
    """
    base = Path(run).expanduser()
    if not base.is_dir():
        raise CheckpointError(f"{KEY}={run} is no folder. Give that of a tokenizer. {HOW}")
    for inside in _INSIDE:
        folder = base / inside
        if (folder / "config.json").is_file():
            read_config(folder, "MSVQ")
            if not any((folder / name).is_file() for name in WEIGHTS):
                raise CheckpointError(
                    f"{folder} holds a config.json and no {WEIGHTS[0]}, and a tokenizer has both. "
                    "Copy the folder again."
                )
            return folder
    if (base / "config.yaml").is_file():
        raise CheckpointError(
            f"{KEY}={run} is a run without an export/ folder, in which a tokenizer's weights were "
            "expected. Training writes it at its end: go on with resume=latest, or give another "
            "run."
        )
    raise CheckpointError(
        f"{KEY}={run} holds no tokenizer: config.json and {WEIGHTS[0]} were expected there, or in "
        f"model/ or export/. Give another folder. {HOW}"
    )


def holds_tokenizer(run: str) -> bool:
    """Return whether a folder holds a tokenizer where :func:`locate_tokenizer` looks."""
    try:
        locate_tokenizer(run)
    except CheckpointError:
        return False
    return True


def read_settings(run: str) -> dict[str, Any]:
    """Read what others must know of a tokenizer.

    Returns:
        ``scales`` (sides or pairs), ``vocab_size``, ``latent_channels``, ``image_channels``, and
        ``downsample``.

    Raises:
        CheckpointError: there is no tokenizer, or its config lacks one of these.
    """
    folder = locate_tokenizer(run)
    config = read_config(folder, "MSVQ")
    names = ("scales", "vocab_size", "latent_channels", "image_channels", "channel_multipliers")
    lacking = [name for name in names if name not in config]
    if lacking:
        raise CheckpointError(
            f"{folder / 'config.json'} does not say {lacking[0]}, and a tokenizer's config does. "
            "Copy the folder again."
        )
    settings = {name: config[name] for name in names}
    levels = len(settings.pop("channel_multipliers"))
    return {**settings, "downsample": 2 ** (levels - 1)}
