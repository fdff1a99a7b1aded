"""KL autoencoders that are trained here: diffusers' AutoencoderKL inside, and a run read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from genscale.autoencoders.base import Variational
from genscale.autoencoders.diffusers_folder import Source, locate, read_config
from genscale.autoencoders.kl import KL
from genscale.errors import ConfigError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


class KLNetwork(Variational):
    """An AutoencoderKL of free sizes, with weights to train (arXiv:2112.10752).

    Args:
        sample_size: side of the pictures it is trained on.
        image_channels: channels of the pictures.
        latent_channels: channels of the latents.
        hidden_size: width at the picture's own resolution.
        channel_multipliers: width of every level in units of ``hidden_size``; each level but the
            last halves the resolution.
        num_blocks: residual blocks a level in the encoder; the decoder has one more.
        norm_groups: groups of the norms; divides every width.
        middle_attention: attention between the halves.

    Attributes:
        scale: 1 until it is measured, see :meth:`standardise`.
        shift: 0 until then.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        sample_size: int = 256,
        image_channels: int = 3,
        latent_channels: int = 4,
        hidden_size: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4, 4),
        num_blocks: int = 2,
        norm_groups: int = 32,
        middle_attention: bool = True,
    ) -> None:
        super().__init__()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        widths = tuple(hidden_size * factor for factor in channel_multipliers)
        wrong = [width for width in widths if norm_groups < 1 or width < 1 or width % norm_groups]
        if wrong or not widths:
            raise ConfigError(
                f"norm_groups={norm_groups} must divide every width, but the widths are "
                f"{list(widths)}. Change model.hidden_size, channel_multipliers or norm_groups."
            )
        if num_blocks < 1 or latent_channels < 1:
            raise ConfigError(
                "model.num_blocks and latent_channels must be at least 1, but "
                f"{num_blocks} and {latent_channels} were given. Change them."
            )
        self.image_channels = image_channels
        self.latent_channels = latent_channels
        self.downsample = 2 ** (len(widths) - 1)
        self.sample_shape = (image_channels, sample_size, sample_size)
        self.scale, self.shift = 1.0, 0.0
        self.network: AutoencoderKL = AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=num_blocks,
            latent_channels=latent_channels,
            norm_num_groups=norm_groups,
            sample_size=sample_size,
            mid_block_add_attention=middle_attention,
        )

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weights."""
        return cast(nn.Parameter, self.network.decoder.conv_out.weight)

    def moments(self, images: Tensor) -> Tensor:
        """Encode images to moments; see :meth:`Variational.moments`.

        Raises:
            ConfigError: pictures of other channels, or of sizes that do not divide.
        """
        channels, height, width = images.shape[1:]
        if channels != self.image_channels or height % self.downsample or width % self.downsample:
            raise ConfigError(
                f"The autoencoder takes pictures of {self.image_channels} channel(s) and sides "
                f"that are multiples of {self.downsample}, but these are {channels} x {height} x "
                f"{width}. Give data.channels and data.resolution to fit."
            )
        moments: Tensor = self.network.encode(images).latent_dist.parameters
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents; see :meth:`Autoencoder.decode`."""
        images: Tensor = self.network.decode(latents / self.scale + self.shift).sample
        return images

    def encoder_digest(self) -> str | None:
        """Return None: the weights are still moving."""
        return None

    @torch.no_grad()
    def standardise(self, images: Tensor, *, batch_size: int = 256) -> None:
        """Measure scale and shift, so that the latents of ``images`` have mean 0 and deviation 1.

        Of the posterior, means are looked at; one number each for all channels, as diffusers'
        config knows them.
        """
        parts = [self.moments(part) for part in images.split(batch_size)]
        means = torch.cat(parts).chunk(2, dim=1)[0].double()
        self.shift = float(means.mean())
        self.scale = float(1.0 / means.std().clamp(min=1e-6))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder of diffusers (created if missing), scale and shift in its config."""
        self.network.register_to_config(scaling_factor=self.scale, shift_factor=self.shift)
        self.network.save_pretrained(folder)


class TrainedKL(KL):
    """What ``python train.py model=kl_small`` left behind, to be encoded and decoded with.

    Scale and shift are those that were measured at the end of that run.

    Args:
        run: the run's folder, or its ``export``; None where nothing is encoded or decoded yet.
        latent_channels: as the run has it; sizes of models follow from it.
        downsample: likewise.
        image_channels: likewise.

    Raises:
        ConfigError: the run has other channels or another factor.
        CheckpointError: there is no export in that folder.
    """

    def __init__(
        self,
        *,
        run: str | None = None,
        latent_channels: int = 4,
        downsample: int = 4,
        image_channels: int = 1,
    ) -> None:
        stated: dict[str, Any] = {}
        source = None
        if run is not None:
            place = Path(run).expanduser()
            source = str(place / "export" if (place / "export").is_dir() else place)
            config = read_config(locate(Source("autoencoder.run", source)))
            stated = {
                "scale": config.get("scaling_factor", 1.0),
                "shift": config.get("shift_factor") or 0.0,
            }
            found = int(config.get("in_channels", 3))
            if found != image_channels:
                raise ConfigError(
                    f"The autoencoder of autoencoder.run={run} takes pictures of {found} "
                    f"channel(s), but autoencoder.image_channels={image_channels}. Give "
                    f"data.channels={found}, or the run of another autoencoder."
                )
        super().__init__(
            source=source,
            latent_channels=latent_channels,
            downsample=downsample,
            image_channels=image_channels,
            **stated,
        )

    def check(self, *, encodes: bool, decodes: bool) -> list[str]:
        """Return a sentence where there is no run, or one that contradicts the settings."""
        if self.source is None and (encodes or decodes):
            return [
                "autoencoder.run is not set. Train one with: python train.py model=kl_small "
                "data=<the same>, and give autoencoder.run=<its folder>."
            ]
        return super().check(encodes=encodes, decodes=decodes)
