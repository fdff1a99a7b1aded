"""A decoder that waits in the memory of the CPU, through accelerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genscale.autoencoders.base import Autoencoder
from genscale.errors import require


class OffloadedDecoder(nn.Module):
    """Decodes on a device on which the autoencoder is only while it works.

    The autoencoder moves as a whole: its weights are few beside a batch of its features, and one
    that reads its weights on first use keeps working.

    Args:
        autoencoder: goes to the CPU at once.
        device: where to decode.

    Raises:
        ImportError: accelerate is not installed.
    """

    def __init__(self, autoencoder: Autoencoder, device: torch.device) -> None:
        super().__init__()
        self._accelerate: Any = require("accelerate", what="offload=true", extra="offload")
        self.autoencoder = autoencoder.to("cpu")
        self.device = device
        self._hook: Any = None
        self._attach()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``(B, C, H, W)`` on the device, and leave it again."""
        images: Tensor = self(latents)
        if self._hook is None:
            self._attach()  # there are weights now, where they are read on first use
        else:
            self._hook.offload()
        return images

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents wherever the autoencoder is; the hook brings it to the device."""
        return self.autoencoder.decode(latents)

    def _attach(self) -> None:
        """Put accelerate's hook on; it wants a module with weights, and sends it to the CPU."""
        if any(True for _ in self.parameters()):
            _, self._hook = self._accelerate.cpu_offload_with_hook(self, self.device)
