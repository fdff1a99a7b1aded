"""``data.buckets``: whether what is trained takes pictures of all these shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from genscale.errors import ConfigError

if TYPE_CHECKING:
    from genscale.autoencoders.base import Autoencoder
    from genscale.backbones.base import Backbone


def check_shapes(datamodule: Any, model: Backbone, autoencoder: Autoencoder) -> None:
    """Refuse buckets that a network cannot be trained on, before the first step.

    Raises:
        ConfigError: names the first bucket that does not fit.
    """
    from genscale.autoencoders.base import ScaleTokenizer
    from genscale.sizes import shape_at

    if datamodule.buckets is None:
        return
    if isinstance(autoencoder, ScaleTokenizer):
        raise ConfigError(
            f"data.buckets was given, but {type(model).__name__} learns the tokens of one schedule "
            "of scales. Leave data.buckets out; sampling takes other sizes with size=..."
        )
    for bucket in datamodule.buckets:
        try:
            shape_at(model, autoencoder.downsample, bucket)
        except ConfigError as error:
            raise ConfigError(f"data.buckets has {list(bucket)}, but {error}") from error


def no_buckets(datamodule: Any, name: str) -> list[str]:
    """Return a sentence if pictures of several shapes are given to what learns from one."""
    if datamodule.buckets is None:
        return []
    return [
        f"data.buckets was given, but {name} learns from pictures of one size. Leave it out: its "
        "convolutions take any size afterwards."
    ]
