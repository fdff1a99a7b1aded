"""How VBench makes one score of its dimensions (arXiv:2311.17982, Apache-2.0)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from genscale.errors import ConfigError, did_you_mean

# lowest and highest score of every dimension, which become 0 and 1
QUALITY_RANGES: dict[str, tuple[float, float]] = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "dynamic_degree": (0.0, 1.0),
    "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
}
SEMANTIC_RANGES: dict[str, tuple[float, float]] = {
    "object_class": (0.0, 1.0),
    "multiple_objects": (0.0, 1.0),
    "human_action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
_RANGES = QUALITY_RANGES | SEMANTIC_RANGES
_WEIGHTS = {"dynamic_degree": 0.5}  # of all others: 1
_QUALITY_WEIGHT, _SEMANTIC_WEIGHT = 4.0, 1.0


@dataclass(frozen=True, slots=True)
class VBenchScore:
    """Summary of all dimensions, each in about [0, 1]."""

    quality: float
    semantic: float
    total: float


def normalised(dimension: str, score: float) -> float:
    """Return a dimension's score on the scale from the lowest (0) to the highest (1) known.

    Raises:
        ConfigError: there is no such dimension.
    """
    if dimension not in _RANGES:
        raise ConfigError(
            f"'{dimension}' is no dimension of VBench. Known are {', '.join(_RANGES)}."
            f"{did_you_mean(dimension, list(_RANGES))}"
        )
    low, high = _RANGES[dimension]
    return (score - low) / (high - low)


def vbench_score(scores: Mapping[str, float]) -> VBenchScore:
    """Return VBench's summary: quality counts four times as much as meaning.

    Args:
        scores: the raw score of every one of the 16 dimensions.

    Raises:
        ConfigError: a dimension is missing or unknown.
    """
    missing = [name for name in _RANGES if name not in scores]
    if missing:
        raise ConfigError(
            f"VBench's summary needs all {len(_RANGES)} dimensions, but {len(missing)} are missing "
            f"(first: {missing[0]}). Give them, or normalise single dimensions."
        )
    parts = {name: normalised(name, score) for name, score in scores.items()}
    quality, semantic = _mean(parts, QUALITY_RANGES), _mean(parts, SEMANTIC_RANGES)
    total = _QUALITY_WEIGHT * quality + _SEMANTIC_WEIGHT * semantic
    return VBenchScore(quality, semantic, total / (_QUALITY_WEIGHT + _SEMANTIC_WEIGHT))


def _mean(parts: Mapping[str, float], names: Mapping[str, object]) -> float:
    weights = {name: _WEIGHTS.get(name, 1.0) for name in names}
    return sum(weights[name] * parts[name] for name in names) / sum(weights.values())
