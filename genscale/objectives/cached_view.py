"""The generator view of a block-causal network: one that remembers the frames before."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from genscale.backbones.base import Backbone
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.scale_cache import cache_dtype
from genscale.objectives.base import Level, Prediction
from genscale.objectives.conversion import Target
from genscale.objectives.network import NetworkView
from genscale.objectives.schedule import NoiseProcess
from genscale.objectives.time_input import TimeInput


class CachedView(NetworkView):
    """A block-causal network that reads the frames which follow those in its memory.

    Without memory a video begins: the network makes an empty cache, whatever frames are given
    then being its first ones. What a call writes into the cache is provisional, and the next call
    writes over it, until :func:`~genscale.layers.video_cache.commit_frames` keeps it.

    Args:
        backbone: the network; it has ``block_size`` and ``begin``.
        process: see :class:`~genscale.objectives.network.NetworkView`.
        target: see there.
        time_input: see there.
        shape: see there.

    Attributes:
        block_size: frames that go together.
        sample_shape: ``(C, F, H, W)``, F as it was trained; videos may be longer.

    Raises:
        ConfigError: a network that is not block-causal.
    """

    def __init__(
        self,
        backbone: Backbone,
        process: NoiseProcess,
        target: Target,
        time_input: TimeInput,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(backbone, process, target, time_input, shape=shape)
        self.block_size = block_size_of(backbone)
        self._begin: Any = getattr(backbone, "begin", None)

    def begin(self, batch: int, shape: tuple[int, ...]) -> Any:
        """Return the memory of ``batch`` videos ``(C, F, H, W)`` that begin."""
        dtype = cache_dtype(self.device, next(self.backbone.parameters()))
        return self._begin(batch, self.device, dtype, shape=shape)

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Estimate clean frames and noise of ``x`` ``(B, C, f, H, W)``; one network evaluation.

        Args:
            x: whole blocks, those that follow the frames kept in ``memory``.
            level: of all frames, or a frame each.
            cond: conditions of B videos.
            memory: of the call before; None begins a video.
        """
        if memory is None:
            # windows and moved patches are of other sides than the video
            memory = self.begin(len(x), (*self.sample_shape[:2], *x.shape[-2:]))
        return super().__call__(x, shared_by_frames(level, len(x)), cond, memory)


def block_size_of(backbone: Backbone) -> int:
    """Return the frames of a block of a block-causal network.

    Raises:
        ConfigError: a network that is not block-causal.
    """
    size = getattr(backbone, "block_size", None)
    if not isinstance(size, int) or not hasattr(backbone, "begin"):
        raise ConfigError(
            f"{type(backbone).__name__} does not make videos block by block, which this objective "
            "trains. Use model=causal_video, or objective=flow."
        )
    return size


def shared_by_frames(level: Level, count: int) -> Level:
    """Return a level without frames where all frames have the same one, else a row a particle.

    Networks compute what depends on the level once where it is shared.
    """
    if not level.by_frame:
        return level
    parts = [level.alpha, level.sigma, *([] if level.time is None else [level.time])]
    if all(bool((part == part[:, :1]).all()) for part in parts):
        time = None if level.time is None else level.time[:, 0]
        return Level(level.alpha[:, 0], level.sigma[:, 0], time)
    return level.expand(count)
