"""VAR's multi-scale VQVAE (arXiv:2404.02905; official program FoundationVision/VAR, MIT)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genscale.autoencoders.base import ScaleTokenizer, weights_digest
from genscale.autoencoders.diffusers_folder import Source, load_as
from genscale.autoencoders.msvq_folder import HOW, KEY, locate_tokenizer, read_settings
from genscale.autoencoders.quantizer import QuantizeOutput, ScaleQuantizer
from genscale.autoencoders.vq_layers import Decoder, Encoder, LevelSettings
from genscale.errors import CheckpointError, ConfigError
from genscale.layers.norm import no_autocast
from genscale.layers.scales import Scales, as_scales


class MSVQ(ScaleTokenizer, ModelMixin, ConfigMixin):
    """A VQGAN whose latents are sums of token maps of growing size.

    All that makes tokens is computed in float32, autocast or not. The defaults are those of the
    published tokenizer, for pictures of 256 x 256.

    Args:
        scales: side, or ``[height, width]``, of every token map, coarse first; the last is the
            latents' size.
        vocab_size: codes V, shared by all scales.
        latent_channels: channels Cv of latents and codes.
        image_channels: channels of the pictures.
        hidden_size: width of the encoder and decoder at the picture's own resolution.
        channel_multipliers: width of every level in units of ``hidden_size``; each level but the
            last halves the resolution.
        num_blocks: residual blocks a level in the encoder; the decoder has one more.
        attention_levels: levels with attention behind every block, counted from 0, the picture's
            own resolution; None for the last alone.
        middle_attention: attention between the halves.
        norm_groups: groups of the norms; divides every width.
        dropout: share of activations dropped in the residual blocks.
        num_phis: phi layers that the scales share; None gives every scale its own. With few scales
            a layer may be nearest to none of them, and then it learns nothing.
        phi_weight: share of the convolution in a phi layer; 0 builds none.
        cosine: match codes by their angle in place of their distance.
        latent_kernel: size of the convolutions before and after quantising; odd.
        beta: weight of the loss that draws the encoder to the codes.

    Raises:
        ConfigError: settings that do not fit together.
    """

    config_name = "config.json"  # type: ignore[assignment]  # the mixin's placeholder is None
    block_classes = ("ResidualBlock", "SpatialAttention")

    @register_to_config
    def __init__(
        self,
        *,
        scales: Sequence[int | Sequence[int]] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        vocab_size: int = 4096,
        latent_channels: int = 32,
        image_channels: int = 3,
        hidden_size: int = 160,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        attention_levels: Sequence[int] | None = None,
        middle_attention: bool = True,
        norm_groups: int = 32,
        dropout: float = 0.0,
        num_phis: int | None = 4,
        phi_weight: float = 0.5,
        cosine: bool = False,
        latent_kernel: int = 3,
        beta: float = 0.25,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.latent_channels = latent_channels
        self.image_channels = image_channels
        self.downsample = 2 ** (len(channel_multipliers) - 1)
        last = len(channel_multipliers) - 1
        settings = LevelSettings(
            widths=tuple(hidden_size * factor for factor in channel_multipliers),
            num_blocks=num_blocks,
            attention_levels=(last,) if attention_levels is None else tuple(attention_levels),
            middle_attention=middle_attention,
            groups=norm_groups,
            dropout=dropout,
        )
        _check_levels(settings, latent_kernel)
        kernel, padding = latent_kernel, latent_kernel // 2
        self.encoder = Encoder(image_channels, latent_channels, settings)
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, kernel, padding=padding)
        self.quantizer = ScaleQuantizer(
            vocab_size=vocab_size,
            latent_channels=latent_channels,
            scales=scales,
            num_phis=num_phis,
            phi_weight=phi_weight,
            cosine=cosine,
            beta=beta,
        )
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, kernel, padding=padding)
        self.decoder = Decoder(latent_channels, image_channels, settings)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.GroupNorm):
                module.reset_parameters()
        self.quantizer.reset_parameters()

    @property
    def scales(self) -> Scales:  # type: ignore[override]  # a property in place of a value
        """Heights and widths of the token maps, coarse first."""
        return self.quantizer.scales

    def use_scales(self, scales: Sequence[int | Sequence[int]]) -> None:
        """Work with other scales from now on, for example those of another resolution."""
        self.quantizer.use_scales(scales)

    def at_scales(self, scales: Sequence[int | Sequence[int]]) -> MSVQ:
        """Return this tokenizer for other scales; see :meth:`ScaleTokenizer.at_scales`."""
        other = copy.copy(self)
        other._modules = dict(self._modules)  # parts are shared, but for the quantiser
        other.quantizer = copy.copy(self.quantizer)
        other.use_scales(scales)
        return other

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape ``(C, H, W)`` of one picture at the resolution of the scales."""
        height, width = self.scales[-1]
        return (self.config["image_channels"], height * self.downsample, width * self.downsample)

    def encode_features(self, images: Tensor) -> Tensor:
        """Encode images ``(B, C, H, W)`` to ``(B, Cv, h, w)``, not quantised yet.

        Raises:
            ConfigError: pictures of other channels, or of sizes that do not divide.
        """
        self.check_pictures(images)
        with no_autocast(images.device):
            features: Tensor = self.quant_conv(self.encoder(images.float()))
        return features

    def quantize(self, features: Tensor) -> QuantizeOutput:
        """Quantise what :meth:`encode_features` returned, with gradients and losses.

        Raises:
            ConfigError: features of another size than the last scale's.
        """
        self._check_size(features)
        with no_autocast(features.device):
            quantized: QuantizeOutput = self.quantizer(features.float())
        return quantized

    def decode(self, latents: Tensor) -> Tensor:
        """Decode running latents ``(B, Cv, h, w)``; see :meth:`Autoencoder.decode`.

        Under autocast convolutions run in its type: tokens do not depend on it.
        """
        images: Tensor = self.decoder(self.post_quant_conv(latents))
        return images

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizeOutput]:
        """Return the pictures again after quantising, ``(B, C, H, W)``, and what that gave."""
        quantized = self.quantize(self.encode_features(images))
        return self.decode(quantized.latent), quantized

    def tokens(self, images: Tensor) -> Tensor:
        """Encode images to tokens; see :meth:`ScaleTokenizer.tokens`.

        Raises:
            ConfigError: pictures of other channels or another size than the scales are for.
        """
        features = self.encode_features(images)
        self._check_size(features)
        with no_autocast(images.device):
            return self.quantizer.encode(features)

    def features(self, tokens: Tensor) -> Tensor:
        """Return the features of all scales; see :meth:`ScaleTokenizer.features`."""
        with no_autocast(tokens.device):
            return self.quantizer.features(tokens)

    def codes(self, tokens: Tensor) -> Tensor:
        """Look tokens up; see :meth:`ScaleTokenizer.codes`."""
        return self.quantizer.codes(tokens)

    def add_scale(self, running: Tensor, codes: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Add one scale to the running latent; see :meth:`ScaleTokenizer.add_scale`."""
        with no_autocast(running.device):
            return self.quantizer.add_scale(running.float(), codes.float(), scale)

    def latent(self, tokens: Tensor) -> Tensor:
        """Return the running latent after all scales; see :meth:`ScaleTokenizer.latent`."""
        return self.snapshots(tokens)[-1]

    def snapshots(self, tokens: Tensor) -> list[Tensor]:
        """Return the running latents ``(B, Cv, H, W)`` after each of the scales."""
        with no_autocast(tokens.device):
            return self.quantizer.snapshots(tokens)

    def num_parameters_by_block(self) -> dict[str, int]:
        """Count parameters by direct child module, for the start-up table."""
        return {
            name: sum(parameter.numel() for parameter in child.parameters())
            for name, child in self.named_children()
        }

    def _check_size(self, features: Tensor) -> None:
        height, width = features.shape[2:]
        if (height, width) != self.scales[-1]:
            rows, columns = self.scales[-1]
            factor = self.downsample
            raise ConfigError(
                f"Pictures of {height * factor} x {width * factor} have latents of {height} x "
                f"{width}, but the last of the scales is {rows} x {columns}. Give pictures of "
                f"{rows * factor} x {columns * factor}, or scales that end with "
                f"[{height}, {width}]."
            )


class TrainedMSVQ(ScaleTokenizer):
    """A trained :class:`MSVQ`, frozen, whose weights are read when they are first needed.

    What is known of it may be stated, so that a network can be built for it before it is there;
    stated numbers are held against the tokenizer's own.

    Args:
        run: folder of a run of ``model=msvq``, or an exported one; None where no picture is
            encoded, no feature made and no latent decoded.
        scales: sides or ``[height, width]`` of the token maps, for another resolution than the
            tokenizer was trained at; None takes its own.
        vocab_size: codes V; None takes the tokenizer's own, as with all that follow.
        latent_channels: channels Cv of the latents.
        downsample: pixels a latent cell covers along one side.
        image_channels: channels of the pictures.

    Raises:
        ConfigError: neither a run nor these numbers are given, or scales that do not grow.
        CheckpointError: numbers are to be read of a run that holds no tokenizer.
    """

    def __init__(
        self,
        *,
        run: str | None = None,
        scales: Sequence[int | Sequence[int]] | None = None,
        vocab_size: int | None = None,
        latent_channels: int | None = None,
        downsample: int | None = None,
        image_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.run = run
        self._stated = {
            "vocab_size": vocab_size,
            "latent_channels": latent_channels,
            "downsample": downsample,
            "image_channels": image_channels,
        }
        settings: dict[str, Any] = {"scales": scales, **self._stated}
        if run is not None and None in settings.values():
            own = read_settings(run)
            settings = {name: own[name] if v is None else v for name, v in settings.items()}
        if any(value is None for name, value in settings.items() if name != "image_channels"):
            raise ConfigError(_lacking("know its sizes"))
        self.scales = as_scales(settings["scales"])
        self.vocab_size = settings["vocab_size"]
        self.latent_channels = settings["latent_channels"]
        self.downsample = settings["downsample"]
        self.image_channels = settings["image_channels"]
        self._msvq: Any = None  # once loaded

    def at_scales(self, scales: Sequence[int | Sequence[int]]) -> TrainedMSVQ:
        """Return this tokenizer for other scales; see :meth:`ScaleTokenizer.at_scales`."""
        msvq = self._loaded("read tokens").at_scales(scales)
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.scales, other._msvq = msvq.scales, msvq
        return other

    def tokens(self, images: Tensor) -> Tensor:
        """Encode images to tokens; see :meth:`MSVQ.tokens`."""
        return self._loaded("encode pictures", images.device).tokens(images)

    def features(self, tokens: Tensor) -> Tensor:
        """Return the features of all scales; see :meth:`ScaleTokenizer.features`."""
        return self._loaded("read tokens", tokens.device).features(tokens)

    def codes(self, tokens: Tensor) -> Tensor:
        """Look tokens up; see :meth:`ScaleTokenizer.codes`."""
        return self._loaded("read tokens", tokens.device).codes(tokens)

    def add_scale(self, running: Tensor, codes: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Add one scale to the running latent; see :meth:`ScaleTokenizer.add_scale`."""
        return self._loaded("read tokens", running.device).add_scale(running, codes, scale)

    def latent(self, tokens: Tensor) -> Tensor:
        """Return the running latent after all scales; see :meth:`ScaleTokenizer.latent`."""
        return self._loaded("read tokens", tokens.device).latent(tokens)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode running latents; see :meth:`MSVQ.decode`."""
        return self._loaded("decode samples", latents.device).decode(latents)

    def check(self, *, encodes: bool, decodes: bool) -> list[str]:
        """Return a sentence for a tokenizer that is lacking, not there, or not the one stated.

        Weights are not read.
        """
        if self.run is None:
            needs = ["encode pictures"] * encodes + ["decode samples"] * decodes
            return [_lacking(needs[0])] if needs else []
        try:
            self._hold_against(read_settings(self.run))
        except (CheckpointError, ConfigError) as error:
            return [str(error)]
        if encodes and Path(self.run).expanduser().is_symlink():
            target = Path(self.run).expanduser().resolve()
            return [
                f"{KEY}={self.run} is a link, which may point elsewhere when this run is read "
                f"back. Give what it points to: {KEY}={target}"
            ]
        return []

    @property
    def protocol_name(self) -> str:
        """Return ``msvq`` and the first digits of the digest of all that makes pictures."""
        parts = ("quantizer.embedding.", "quantizer.phis.", "post_quant_conv.", "decoder.")
        return f"msvq:{weights_digest(self._loaded('decode samples'), parts)[:8]}"

    def _hold_against(self, own: dict[str, Any]) -> None:
        """Hold the stated numbers against the tokenizer's own."""
        for name, value in self._stated.items():
            if value is not None and value != own[name]:
                raise ConfigError(
                    f"autoencoder.{name}={value} was given, but the tokenizer of {KEY}={self.run} "
                    f"has {own[name]}. Give autoencoder.{name}={own[name]}, or another {KEY}."
                )

    def _loaded(self, purpose: str, device: torch.device | None = None) -> MSVQ:
        """Return the tokenizer, read on first use, on a device."""
        if self._msvq is None:
            if self.run is None:
                raise ConfigError(_lacking(purpose))
            self._hold_against(read_settings(self.run))
            self._msvq = load_msvq(self.run, scales=self.scales)
        model: MSVQ = self._msvq
        return model if device in (None, model.device) else model.to(device)  # type: ignore[arg-type]


def load_msvq(run: str, *, scales: Sequence[int | Sequence[int]] | None = None) -> MSVQ:
    """Load a trained tokenizer, frozen and in eval mode.

    Args:
        run: folder of a run of ``model=msvq``, an exported folder, or one that
            ``save_pretrained`` wrote.
        scales: token maps for another resolution; None keeps those it was trained with.

    Raises:
        CheckpointError: no tokenizer there, or a damaged one.
        ConfigError: scales that do not grow.
    """
    folder = locate_tokenizer(run)
    model = load_as(MSVQ, folder, Source(KEY, str(folder)))
    if scales is not None:
        model.use_scales(scales)
    return model


def _lacking(purpose: str) -> str:
    return (
        f"{KEY} is not set, and a trained tokenizer is needed to {purpose}. {HOW}, or import VAR's "
        f"(python -m genscale.cli.import_checkpoint family=msvq), and give {KEY}=<its folder>."
    )


def _check_levels(settings: LevelSettings, latent_kernel: int) -> None:
    """Check what does not depend on the quantiser.

    Raises:
        ConfigError: settings that do not fit together.
    """
    widths = settings.widths
    if not widths or min(widths) < 1 or settings.num_blocks < 1:
        raise ConfigError(
            "hidden_size, channel_multipliers and num_blocks must be at least 1, but the widths "
            f"are {list(widths)} with {settings.num_blocks} blocks. Change them."
        )
    wrong = [width for width in widths if settings.groups < 1 or width % settings.groups]
    if wrong:
        raise ConfigError(
            f"norm_groups={settings.groups} does not divide a width of {wrong[0]}, which "
            "hidden_size and channel_multipliers give. Change one of them."
        )
    outside = [level for level in settings.attention_levels if not 0 <= level < len(widths)]
    if outside:
        raise ConfigError(
            f"attention_levels names level {outside[0]}, but levels are 0 to {len(widths) - 1}. "
            "Leave it out."
        )
    if latent_kernel < 1 or latent_kernel % 2 == 0:
        raise ConfigError(
            f"latent_kernel must be odd, so that sizes are kept, but {latent_kernel} was given. "
            "Give 1 or 3."
        )
