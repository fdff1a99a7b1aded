"""Published protocols of FVD: a name stands for all of its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from genscale.errors import ConfigError, did_you_mean
from genscale.metrics.clip_protocol import ClipProtocol
from genscale.metrics.protocol import EvalProtocol


@dataclass(frozen=True, slots=True, kw_only=True)
class FVDProtocol:
    """One row of the table of protocols.

    Attributes:
        num_samples: generated clips.
        max_real: real clips, at most; None: all there are.
        frames: frames the network reads.
        stride: one of how many frames is read.
        real_clips: which clip of a real video; see :class:`ClipProtocol`.
        frame_rate: frames a second; 0 where the data set's own is meant.
        class_law: how labels or prompts of the samples are chosen.
    """

    num_samples: int
    max_real: int | None
    frames: int = 16
    stride: int = 1
    real_clips: str = "random_offset"
    frame_rate: float = 0.0
    class_law: str = "unconditional"


# StyleGAN-V's three (arXiv:2112.14683); zero-shot UCF-101 as Snap Video and Video LDM state it, or
# smaller; zero-shot MSR-VTT (its CLIPSIM and CLIP-FID are of the same clips); all real clips
FVD_PROTOCOLS: dict[str, FVDProtocol] = {
    "fvd2048_16f": FVDProtocol(num_samples=2048, max_real=2048),
    "fvd2048_128f": FVDProtocol(num_samples=2048, max_real=2048, frames=128),
    "fvd2048_128f_subsample8f": FVDProtocol(num_samples=2048, max_real=2048, stride=8),
    "ucf101_zero_shot_10k": FVDProtocol(
        num_samples=10_000, max_real=None, frame_rate=25.0, class_law="empirical"
    ),
    "ucf101_zero_shot_2048": FVDProtocol(
        num_samples=2048, max_real=None, frame_rate=25.0, class_law="empirical"
    ),
    "msrvtt_zero_shot": FVDProtocol(num_samples=59_800, max_real=2990, class_law="prompts"),
    "full_2048_16f": FVDProtocol(num_samples=2048, max_real=None),
}


def fvd_protocol(name: str, *, reference: str, codec: str = "frames") -> EvalProtocol:
    """Return a published protocol, to be completed by a suite's own facts.

    Args:
        name: of :data:`FVD_PROTOCOLS`.
        reference: name of the real set.
        codec: how real and generated frames were stored.

    Raises:
        ConfigError: there is no such protocol.
    """
    if name not in FVD_PROTOCOLS:
        raise ConfigError(
            f"'{name}' is no protocol of FVD. Known are {', '.join(FVD_PROTOCOLS)}."
            f"{did_you_mean(name, list(FVD_PROTOCOLS))}"
        )
    row = FVD_PROTOCOLS[name]
    return EvalProtocol(
        features="i3d_torchscript",
        resize="torch_bilinear",
        reference=reference,
        reference_split="train",
        reference_count=row.max_real or 0,
        num_samples=row.num_samples,
        class_law=row.class_law,
        covariance="biased",
        clips=ClipProtocol(
            frames=row.frames,
            stride=row.stride,
            frame_rate=row.frame_rate,
            real_clips=row.real_clips,
            codec=codec,
        ),
    )
