"""What a latent upscaler must know of an autoencoder: its space, and how latents get there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genscale.autoencoders.base import Autoencoder, Variational
from genscale.upscaling.latent_conventions import known_family


def decoder_affine(autoencoder: Autoencoder, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return shift and scale of latents = (u - shift) * scale, to be broadcast over pictures.

    Upscalers read u, which is what the decoder itself takes: one upscaler then serves every
    program that uses the autoencoder.

    Args:
        autoencoder: of any kind; without scale and shift of its own they are 1 and 0.
        like: tells the device.
    """
    if not isinstance(autoencoder, Variational):
        return like.new_zeros(()), like.new_ones(())
    settings = autoencoder.settings()
    numbers = (torch.as_tensor(settings[name], dtype=torch.float32) for name in ("shift", "scale"))
    shift, scale = (n.to(like.device).reshape(1, -1, 1, 1) for n in numbers)
    return shift, scale


def space_of(autoencoder: Autoencoder) -> str | None:
    """Return the name of an autoencoder's latent space, where its numbers are of one known."""
    if not isinstance(autoencoder, Variational):
        return None
    settings = autoencoder.settings()
    if "kind" in settings:  # of clips
        return str(settings["kind"])
    return known_family(autoencoder.latent_channels, settings["scale"], settings["shift"])


def autoencoder_facts(autoencoder: Autoencoder) -> dict[str, Any]:
    """Return what tells an autoencoder's latents from others, for ``upscaler.json``."""
    known: dict[str, Any] = {
        "name": type(autoencoder).__name__,
        "encoder": None,
        "latent_channels": autoencoder.latent_channels,
        "downsample": autoencoder.downsample,
    }
    if isinstance(autoencoder, Variational):
        known |= autoencoder.settings()
        known["encoder"] = autoencoder.encoder_digest()
    return known
