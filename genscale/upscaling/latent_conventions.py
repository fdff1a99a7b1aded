"""From what a diffusers pipeline puts out as latents to what its VAE decodes, and to pictures.

Nothing here knows pipelines by name: constants are those of ``pipe.vae.config``, the layout is
told by the shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError
from genscale.upscaling.tiling import in_tiles

# name of a latent space -> channels, scaling factor and shift that its VAE states
FAMILIES: dict[str, tuple[int, float, float]] = {
    "sd": (4, 0.18215, 0.0),
    "sdxl": (4, 0.13025, 0.0),
    "sd3": (16, 1.5305, 0.0609),
    "flux": (16, 0.3611, 0.1159),
}
# classes of VAEs that state a mean and deviation of every channel in place of those
_BY_CLASS = {
    "AutoencoderKLQwenImage": "qwen",
    "AutoencoderKLWan": "wan",
    "AutoencoderKLFlux2": "flux2",
}
DECODE_LIMIT = 256 * 256  # latent cells that are decoded at once where nothing is said
DECODE_TILE = 128  # side of a tile beyond them


def to_vae_space(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Turn what ``pipe(..., output_type="latent")`` returns into what its VAE decodes.

    Packed latents ``(B, h/2 * w/2, 4 C)`` are unpacked; scale and shift, or the mean and
    deviation of every channel, are undone in float32.

    Args:
        pipe: a diffusers pipeline: its ``vae`` and ``vae_scale_factor`` are read.
        latents: ``(B, C, h, w)``, ``(B, C, 1, h, w)``, or packed.
        height: of the picture in pixels.
        width: of the picture in pixels.

    Returns:
        float32 ``(B, C, h, w)``.

    Raises:
        ConfigError: clips, other channels than the VAE's, or a size that does not fit.
    """
    config, channels, stride = pipe.vae.config, vae_channels(pipe), vae_stride(pipe)
    # the size as pipelines round it: packing takes two cells a side
    packed = latents.dim() == 3
    step = 2 * stride if packed else stride
    rows, columns = height // step, width // step
    if packed:
        if latents.shape[1:] != (rows * columns, 4 * channels):
            raise _misfit(pipe, latents, (rows * columns, 4 * channels), (height, width))
        y = latents.float().transpose(1, 2).unflatten(2, (rows, columns))
        if hasattr(pipe.vae, "bn"):
            return F.pixel_shuffle(_from_batch_norm(pipe.vae, y), 2)
        y = F.pixel_shuffle(y, 2)
    else:
        y = latents.float()
        if y.dim() == 5 and y.shape[2] == 1:
            y = y[:, :, 0]
        if tuple(y.shape[1:]) != (channels, rows, columns):
            raise _misfit(pipe, latents, (channels, rows, columns), (height, width))
    scale = float(_stated(config, "scaling_factor") or 1.0)
    mean, deviation = _stated(config, "latents_mean"), _stated(config, "latents_std")
    if mean is not None and deviation is not None:
        return y * _by_channel(deviation, y) / scale + _by_channel(mean, y)
    return y / scale + float(_stated(config, "shift_factor") or 0.0)


@torch.no_grad()
def decode(
    pipe: Any,
    latents: Tensor,
    *,
    tile: int | None = None,
    overlap: int = 16,
    output_type: str = "pil",
) -> Any:
    """Decode latents of VAE space to pictures.

    A VAE in half precision that says it overflows (``force_upcast``) decodes in float32 and is
    put back. Tiles are blended linearly; norms of a decoder see a tile alone, so that tiling is
    approximate.

    Args:
        pipe: a diffusers pipeline.
        latents: ``(B, C, h, w)`` as of :func:`to_vae_space`.
        tile: side of a tile in latent cells; None decodes at once, and in tiles of 128 where
            there are more than 256 x 256 cells.
        overlap: cells that neighbouring tiles share; less where the tile is small.
        output_type: ``pil``, ``np`` or ``pt`` as in diffusers.

    Returns:
        what the pipeline itself would return as ``images``.
    """
    vae, stride = pipe.vae, vae_stride(pipe)
    video = vae_is_video(vae)

    def run(part: Tensor) -> Tensor:
        part = part.to(vae.device, vae.dtype)
        image: Tensor = vae.decode(part[:, :, None] if video else part, return_dict=False)[0]
        return (image[:, :, 0] if video else image).float()

    if tile is None and latents.shape[2] * latents.shape[3] > DECODE_LIMIT:
        tile = DECODE_TILE
    with _without_overflow(vae):
        if tile is None:
            images = run(latents)
        else:
            images = in_tiles(run, latents, stride, tile=tile, overlap=min(overlap, tile // 2))
    return pipe.image_processor.postprocess(images, output_type=output_type)


def family_of(pipe: Any) -> str | None:
    """Return the latent space of a pipeline's VAE; None where its numbers are of none known.

    Spaces are told by channels and constants: SD3 and FLUX both have 16 channels.
    """
    name = type(pipe.vae).__name__
    if name in _BY_CLASS:
        return _BY_CLASS[name]
    config = pipe.vae.config
    found = (_stated(config, "scaling_factor"), _stated(config, "shift_factor") or 0.0)
    if found[0] is None or _stated(config, "latents_mean") is not None:
        return None
    return known_family(vae_channels(pipe), *found)


def known_family(channels: int, scale: float, shift: float) -> str | None:
    """Return the latent space that has these numbers; None where none known has."""
    for family, numbers in FAMILIES.items():
        same = abs(scale - numbers[1]) < 1e-4 and abs(shift - numbers[2]) < 1e-4
        if same and channels == numbers[0]:
            return family
    return None


def vae_channels(pipe: Any) -> int:
    """Return the channels of a pipeline's latents."""
    config = pipe.vae.config
    return int(_stated(config, "latent_channels") or _stated(config, "z_dim"))


def vae_stride(pipe: Any) -> int:
    """Return the pixels that a latent cell covers along one side."""
    return int(pipe.vae_scale_factor)


def vae_is_video(vae: Any) -> bool:
    """Return whether a VAE takes clips ``(B, C, T, h, w)``, also of a single picture."""
    return _stated(vae.config, "z_dim") is not None


@contextmanager
def _without_overflow(vae: Any) -> Iterator[None]:
    """Run a VAE in float32 that is in float16 and says that it overflows there."""
    before = vae.dtype
    upcast = before == torch.float16 and bool(_stated(vae.config, "force_upcast"))
    if upcast:
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype=before)


def _from_batch_norm(vae: Any, y: Tensor) -> Tensor:
    """Undo the normalisation of 2x2 patches ``(B, 4 C, h/2, w/2)`` by stored statistics."""
    eps = float(vae.config.batch_norm_eps)
    deviation = torch.sqrt(vae.bn.running_var.float() + eps)
    return y * _by_channel(deviation, y) + _by_channel(vae.bn.running_mean, y)


def _by_channel(values: Any, like: Tensor) -> Tensor:
    tensor = torch.as_tensor(values, dtype=torch.float32).to(like.device)
    return tensor.view(1, -1, 1, 1)


def _stated(config: Any, name: str) -> Any:
    return config.get(name) if hasattr(config, "get") else getattr(config, name, None)


def _misfit(
    pipe: Any, latents: Tensor, wanted: tuple[int, ...], size: tuple[int, int]
) -> ConfigError:
    clip = latents.dim() == 5 and latents.shape[2] > 1
    return ConfigError(
        f"Latents (B, {', '.join(map(str, wanted))}) were expected of a {type(pipe).__name__} for "
        f"pictures of {size[0]} x {size[1]}, but their shape is {tuple(latents.shape)}. "
        + ("Give the frames of a clip one by one." if clip else "Give the height and width used.")
    )
