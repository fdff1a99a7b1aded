"""``autoencoder=run``: the config node of whatever autoencoder a run trained. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genscale.autoencoders.msvq_folder import holds_tokenizer, read_settings
from genscale.errors import ConfigError
from genscale.runs import RunFolder

_OF_TOKENIZER = ("scales", "vocab_size", "latent_channels", "downsample", "image_channels")


def trained_node(run: str) -> dict[str, Any]:
    """Return the node that builds the autoencoder of a run.

    Args:
        run: folder of a run of ``model=kl_small`` or ``model=msvq``, or a tokenizer's.

    Raises:
        ConfigError: no run there, or one that trained something else.
    """
    if not (Path(run).expanduser() / "config.yaml").is_file() and holds_tokenizer(run):
        return _tokenizer(run)
    model = RunFolder.open(run).config().get("model") or {}
    kind = str(model.get("_target_", "nothing")).rpartition(".")[2]
    if kind == "MSVQ":
        return _tokenizer(run)
    if kind == "KLNetwork":
        return {
            "_target_": "genscale.autoencoders.kl_network.TrainedKL",
            "run": run,
            "latent_channels": int(model["latent_channels"]),
            "downsample": 2 ** (len(model["channel_multipliers"]) - 1),
            "image_channels": int(model["image_channels"]),
        }
    raise ConfigError(
        f"autoencoder.run={run} trained {kind}, which is no autoencoder. Give the run of "
        "model=kl_small or model=msvq."
    )


def _tokenizer(run: str) -> dict[str, Any]:
    settings = read_settings(run)
    return {
        "_target_": "genscale.autoencoders.msvq.TrainedMSVQ",
        "run": run,
        **{name: settings[name] for name in _OF_TOKENIZER},
    }
