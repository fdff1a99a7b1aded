"""What must be known about a number before it may stand beside another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from genscale.errors import ProtocolError
from genscale.metrics.clip_protocol import ClipProtocol

Setting = tuple[str, int | float | str | bool]

_CHOICES = {
    "quantise": ("round", "truncate", "none"),
    "class_law": (
        *("uniform_random", "balanced", "empirical", "listed", "unconditional"),
        *("heldout_captions", "prompts"),
    ),
    "covariance": ("unbiased", "biased"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalProtocol:
    """Everything that changes a metric's value, hashed; numbers of two hashes are not compared.

    Attributes:
        features: feature network, for example ``inception_tf``; empty where none is used.
        features_sha256: digest of its weights.
        resize: ``tf1_bilinear``, ``torch_bilinear``, ``pil_bicubic_antialias``,
            ``torch_antialias``, ``box...`` or ``none``.
        quantise: samples to 8 bits by ``round`` (half up), ``truncate``, or ``none``.
        reference: name of the reference set or file.
        reference_sha256: digest of the data or statistics.
        reference_split: split of the data set.
        reference_crop: how pictures were brought to size.
        reference_count: number of reference pictures; 0 where a statistics file does not say.
        num_samples: number of generated pictures.
        class_law: how their labels, or their prompts, were chosen.
        seeds: how noise and labels are addressed.
        sampler: solver or decoding.
        steps: its number of steps.
        nfe: network evaluations a sample.
        solver: ``ode``, ``sde``, ``tokens`` (scale-wise models) or empty.
        guidance: kind of guidance.
        guidance_scale: its scale; None without guidance.
        guidance_interval: (low, high) where guidance is on; None for everywhere.
        network_dtype: arithmetic of the model.
        decoder_dtype: arithmetic of the autoencoder.
        autoencoder: its variant.
        weights: ``raw`` or the average's length, for example ``ema_0.9999``.
        covariance: ``unbiased`` (n - 1) or ``biased`` (n), always float64.
        trace_route: how the trace of the root is taken.
        settings: further numbers of the metric itself, sorted by name.
        clips: of clips, their frames and where they come from; None for pictures.
    """

    features: str = ""
    features_sha256: str = ""
    resize: str = ""
    quantise: str = "round"
    reference: str = ""
    reference_sha256: str = ""
    reference_split: str = ""
    reference_crop: str = ""
    reference_count: int = 0
    num_samples: int = 0
    class_law: str = "balanced"
    seeds: str = "generator(seed, i)"
    sampler: str = ""
    steps: int = 0
    nfe: float = 0.0
    solver: str = ""
    guidance: str = "none"
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    network_dtype: str = "float32"
    decoder_dtype: str = "float32"
    autoencoder: str = "identity"
    weights: str = "raw"
    covariance: str = "unbiased"
    trace_route: str = "auto"
    settings: tuple[Setting, ...] = ()
    clips: ClipProtocol | None = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ProtocolError(
                    f"protocol.{name}='{getattr(self, name)}' is unknown. "
                    f"Choose one of {', '.join(known)}."
                )
        if self.features == "inception_torchvision":
            raise ProtocolError(
                "features='inception_torchvision' are no FID features: its weights and pooling "
                "differ. Use inception_tf."
            )
        # equal numbers must hash equally however they were written
        object.__setattr__(self, "nfe", float(self.nfe))
        if self.guidance_scale is not None:
            object.__setattr__(self, "guidance_scale", float(self.guidance_scale))
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            object.__setattr__(self, "guidance_interval", (float(low), float(high)))
        object.__setattr__(self, "settings", tuple(sorted(map(_pair, self.settings))))

    def canonical_json(self) -> str:
        """Return the one JSON text of these fields: sorted keys, no spaces."""
        values = asdict(self)
        if self.clips is None:  # protocols of pictures hash as they did before there were clips
            del values["clips"]
        return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def digest(self) -> str:
        """The first 8 hex digits of the SHA-256 of :meth:`canonical_json`."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:8]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return json.loads(self.canonical_json())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EvalProtocol:
        """Rebuild a protocol from :meth:`to_dict`.

        Raises:
            ProtocolError: if a field is unknown.
        """
        known = {each.name for each in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ProtocolError(
                f"'{unknown[0]}' is no field of an evaluation protocol. "
                f"Known are {', '.join(sorted(known))}."
            )
        interval, clips = values.get("guidance_interval"), values.get("clips")
        read = {"guidance_interval": interval and tuple(interval)}
        return cls(**values | read | {"clips": clips and ClipProtocol.from_dict(clips)})

    def replace(self, **changes: Any) -> EvalProtocol:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def differences(self, other: EvalProtocol) -> tuple[str, ...]:
        """Return the names of the fields in which two protocols differ."""
        return tuple(
            each.name
            for each in fields(self)
            if getattr(self, each.name) != getattr(other, each.name)
        )

    @classmethod
    def adm50k(cls, *, reference: str = "VIRTUAL_imagenet256_labeled") -> EvalProtocol:
        """Return the table default: FID-50k against the ADM suite's statistics."""
        return cls(
            features="inception_tf",
            resize="tf1_bilinear",
            reference=reference,
            reference_split="train",
            reference_crop="adm_center_crop",
            num_samples=50_000,
            class_law="uniform_random",
        )

    @classmethod
    def adm10k(cls, *, reference: str = "VIRTUAL_imagenet256_labeled") -> EvalProtocol:
        """Return :meth:`adm50k` with 10,000 samples: for monitoring, biased upwards."""
        return cls.adm50k(reference=reference).replace(num_samples=10_000)

    @classmethod
    def clean50k(cls, *, reference: str) -> EvalProtocol:
        """Return 50,000 samples resized with Pillow's antialiased bicubic (arXiv:2104.11222)."""
        return cls.adm50k(reference=reference).replace(
            resize="pil_bicubic_antialias", reference_crop=""
        )

    @classmethod
    def fd_dino50k(cls, *, reference: str) -> EvalProtocol:
        """Return 50,000 samples on DINOv2 ViT-L/14 features (arXiv:2306.04675)."""
        return cls.clean50k(reference=reference).replace(features="dinov2_vitl14")


def _pair(setting: Sequence[Any]) -> Setting:
    name, value = setting  # a JSON round trip turns pairs into lists
    return str(name), value


@dataclass(frozen=True, slots=True)
class MetricValue:
    """A number with the protocol it was computed under.

    Attributes:
        name: the metric.
        value: the number.
        protocol_hash: digest of its protocol.
        details: further numbers: counts, the real/real floor, spread, seconds.
        protocol: the protocol itself.
    """

    name: str
    value: float
    protocol_hash: str
    details: dict[str, Any] = field(default_factory=dict)
    protocol: EvalProtocol | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what ``metrics.json`` stores of a number; protocols are stored beside, by hash."""
        return {
            "name": self.name,
            "value": self.value,
            "protocol": self.protocol_hash,
            "details": self.details,
        }


def require_comparable(
    first: EvalProtocol, second: EvalProtocol, *, allow: Iterable[str] = ()
) -> None:
    """Refuse to compare numbers of different protocols.

    Args:
        first: protocol of one number.
        second: protocol of the other.
        allow: fields that may differ, because they are what is being compared.

    Raises:
        ProtocolError: names the differing fields with both values.
    """
    differing = [name for name in first.differences(second) if name not in set(allow)]
    if differing:
        listed = ", ".join(
            f"{name} ({getattr(first, name)!r} and {getattr(second, name)!r})" for name in differing
        )
        raise ProtocolError(
            f"Numbers of protocols {first.digest} and {second.digest} cannot be compared: they "
            f"differ in {listed}. Evaluate both under one protocol."
        )


def require_one_protocol(values: Sequence[MetricValue], *, allow: Iterable[str] = ()) -> None:
    """Refuse a table of one metric whose numbers come from different protocols.

    Raises:
        ProtocolError: names the differing fields; or a number carries no protocol to look at.
    """
    allowed = tuple(allow)
    for value in values[1:]:
        if value.protocol_hash == values[0].protocol_hash:
            continue
        if value.protocol is None or values[0].protocol is None:
            raise ProtocolError(
                f"'{value.name}' was computed under protocols {values[0].protocol_hash} and "
                f"{value.protocol_hash}, and their fields are not at hand. Keep the protocols with "
                "the numbers."
            )
        require_comparable(values[0].protocol, value.protocol, allow=allowed)
