"""LUA: a latent upscaler before the decoder, one trunk and a head a scale (arXiv:2511.10629)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from genscale.errors import ConfigError
from genscale.rng import key
from genscale.upscaling.base import Upscaler, register_to_config
from genscale.upscaling.swin import Residual, SwinTrunk
from genscale.upscaling.swinir import ShuffleHead


class LUA(Upscaler):
    """Predicts the latent of a larger picture; defaults are those published for FLUX.

    It reads and gives latents as a VAE's decoder takes them, neither shifted nor scaled. Heads
    share the trunk and nothing else.

    Args:
        channels: channels C of the latents.
        scales: factors, a head for each; 3 or powers of 2.
        head_size: width of the heads.
        out_channels: channels that come out; None for C.
        input_size: see :class:`~genscale.upscaling.swin.SwinTrunk`, as are all the others. Keep
            it larger than the window, whatever is trained on: else windows never shift.
        window_size: side of a window.
        depths: blocks of every group.
        hidden_size: width D.
        num_heads: heads of every group.
        mlp_ratio: width of the MLPs in units of D.
        residual: ``1conv`` or ``3conv``.
        img_range: latents are multiplied by it inside.
        drop_path: stochastic depth of the last block.
        qkv_bias: biases of queries, keys and values.
        patch_norm: a norm before the first block.
        positions: a learned table of positions.

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes: ClassVar[tuple[str, ...]] = ("SwinBlock",)
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        channels: int = 16,
        scales: Sequence[int] = (2, 4),
        head_size: int = 256,
        out_channels: int | None = None,
        input_size: int = 32,
        window_size: int = 16,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        hidden_size: int = 360,
        num_heads: Sequence[int] = (12, 12, 12, 12, 12, 12),
        mlp_ratio: float = 2.0,
        residual: Residual = "1conv",
        img_range: float = 1.0,
        drop_path: float = 0.1,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        positions: bool = False,
    ) -> None:
        super().__init__()
        if not scales or len(set(scales)) != len(scales):
            raise ConfigError(
                "model.scales must name at least one scale and none twice, but "
                f"{list(scales)} was given. Change it."
            )
        self.space, self.channels, self.scales = "latent", channels, tuple(scales)
        self.tile_overlap = max(16, window_size)
        self.trunk = SwinTrunk(
            channels=channels,
            input_size=input_size,
            window_size=window_size,
            depths=depths,
            hidden_size=hidden_size,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            residual=residual,
            img_range=img_range,
            drop_path=drop_path,
            qkv_bias=qkv_bias,
            patch_norm=patch_norm,
            positions=positions,
        )
        self.heads = nn.ModuleDict(
            {
                f"x{scale}": ShuffleHead(
                    hidden_size, out_channels or channels, scale, width=head_size
                )
                for scale in scales
            }
        )

    def forward(self, x: Tensor, scale: int) -> Tensor:
        """Upscale; see :meth:`Upscaler.forward`."""
        self.check(x, scale)
        y = self.heads[f"x{scale}"](self.trunk(self.trunk.enter(x)))
        return self.trunk.leave(y, (x.shape[2] * scale, x.shape[3] * scale))

    def freeze_trunk(self, frozen: bool = True) -> None:
        """Train only the convolutions that touch latents: the first, and the last of every head.

        They are what :func:`adapt_channels` starts anew. ``frozen=False`` trains all again.
        """
        ends = (self.trunk.stem, *(head.last for head in self.heads.values()))
        self.requires_grad_(not frozen)
        for conv in ends:
            conv.requires_grad_(True)


def adapt_channels(model: LUA, channels: int, *, seed: int = 0) -> LUA:
    """Return a LUA for latents of another VAE that keeps all but what touches the latents.

    The first convolution starts anew, and where the number of channels changes the last one of
    every head too. Train it with :meth:`LUA.freeze_trunk` first.

    Args:
        model: trained for other latents; not changed.
        channels: of the new latents.
        seed: of the new weights.

    Returns:
        a new model, of the device and type of ``model``.
    """
    settings = {name: value for name, value in model.config.items() if name[0] != "_"}
    # only the new convolutions' numbers remain of those drawn here
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(key(seed, channels)))
        new = LUA(**settings | {"channels": channels, "out_channels": None})
    reference = model.trunk.stem.weight
    # diffusers' own method warns of every cast
    nn.Module.to(new, device=reference.device, dtype=reference.dtype)
    fresh = ["trunk.stem."]
    if channels != model.channels or model.config["out_channels"] not in (None, channels):
        fresh += [f"heads.{name}.last." for name in model.heads]
    kept = {n: v for n, v in model.state_dict().items() if not n.startswith(tuple(fresh))}
    new.load_state_dict(kept, strict=False)
    return new
