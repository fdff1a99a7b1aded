"""What the name of a metric means: which measure, through which feature network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from genscale.errors import ConfigError, did_you_mean
from genscale.metrics.comparison import MEASURES
from genscale.metrics.label_metrics import LABEL_MEASURES
from genscale.metrics.scene_agreement import SCENE_MEASURES
from genscale.metrics.tracking_agreement import TRACK_MEASURES

# Names that published tables use for measures of the FID Inception network.
INCEPTION_NAMES = {
    "fid": "fd",
    "sfid": "sfd",
    "mifid": "mifid",
    "inception_score": "inception_score",
}
# The network behind a bare copy_rate: pictures as they are.
EVERY_PIXEL = "every_pixel"
_PIXEL_MEASURES = ("copy_rate", "novelty_ratio")
# Names that published tables use for measures of I3D.
I3D_NAMES = ("fvd", "kvd")
# in place of a network's name: measures that read the labels, or the captions, of samples, and
# those that give each clip a number of its own
OF_LABELS, OF_CAPTIONS, OF_TRACKS, OF_CLIPS = "", "captions", "tracks", "clips"
OF_PICTURES = "pictures"  # the same of each picture


@dataclass(frozen=True, slots=True)
class PlannedMetric:
    """A metric with its meaning.

    Attributes:
        name: as the user wrote it.
        measure: what is computed.
        network: name of the feature network; :data:`OF_LABELS`, :data:`OF_CAPTIONS`,
            :data:`OF_TRACKS`, :data:`OF_CLIPS` or :data:`OF_PICTURES` for measures that need
            none.
    """

    name: str
    measure: str
    network: str

    @property
    def has_reference(self) -> bool:
        """Whether samples are compared with real pictures."""
        if self.network in (OF_LABELS, OF_CAPTIONS, OF_TRACKS, OF_CLIPS, OF_PICTURES):
            return self.network == OF_LABELS
        return bool(MEASURES[self.measure].reference)

    def lacking(self, values: dict[str, float]) -> str:
        """Return why it is not among the ``values`` of its labels or captions, as a reason."""
        if self.network not in (OF_CAPTIONS, OF_TRACKS):
            return "the samples have no labels"
        return "no caption asks for it" if values else "the samples have no captions"


def plan_metrics(
    names: Sequence[str],
    networks: Sequence[str],
    of_clips: Sequence[str] = (),
    of_pictures: Sequence[str] = (),
) -> list[PlannedMetric]:
    """Say what each metric means; see :class:`genscale.metrics.suite.EvaluationSuite`.

    Args:
        names: names of metrics.
        networks: names of the feature networks, the main one first.
        of_clips: names of the measures of single clips.
        of_pictures: names of the measures of single pictures.

    Raises:
        ConfigError: if a name is unknown, comes twice, or its network is missing.
    """
    for what, each in (("metrics", names), ("metrics.features", networks)):
        twice = sorted({name for name in each if list(each).count(name) > 1})
        if twice:
            raise ConfigError(f"'{twice[0]}' stands twice in {what}. Name every entry once.")
    single = dict.fromkeys(of_clips, OF_CLIPS) | dict.fromkeys(of_pictures, OF_PICTURES)
    return [PlannedMetric(name, *_meaning(name, networks, single)) for name in names]


def _meaning(name: str, networks: Sequence[str], single: Mapping[str, str]) -> tuple[str, str]:
    if name in single:
        return name, single[name]
    if name in LABEL_MEASURES:
        return name, OF_LABELS
    if name in SCENE_MEASURES:
        return name, OF_CAPTIONS
    if name in TRACK_MEASURES:
        return name, OF_TRACKS
    if name in INCEPTION_NAMES:
        if "inception" not in networks:
            raise ConfigError(
                f"metric '{name}' is a number of the FID Inception network, but metrics.features "
                f"has {', '.join(networks) or 'none'}. Use metrics=fid, or add InceptionFID."
            )
        return INCEPTION_NAMES[name], "inception"
    if name in I3D_NAMES:
        if "i3d" not in networks:
            own = ", ".join(f"{name}_{network}" for network in networks) or "none"
            raise ConfigError(
                f"metric '{name}' is a number of I3D, but metrics.features has "
                f"{', '.join(networks) or 'none'}. Use metrics=fvd2048_16f, or of another network "
                f"of clips by its name ({own})."
            )
        return name, "i3d"
    if name in _PIXEL_MEASURES:
        return name, EVERY_PIXEL
    if name in MEASURES:
        if not networks:
            raise ConfigError(
                f"metric '{name}' compares features, but metrics.features is empty. "
                "Add a feature network."
            )
        return name, networks[0]
    for network in networks:
        measure = name.removesuffix(f"_{network}")
        if measure != name and measure in MEASURES:
            return measure, network
    combined = [f"{measure}_{network}" for measure in MEASURES for network in networks]
    special = [*INCEPTION_NAMES, *LABEL_MEASURES, *SCENE_MEASURES, *TRACK_MEASURES, *single]
    known = list(dict.fromkeys([*MEASURES, *special, *combined]))
    raise ConfigError(
        f"'{name}' is no metric. A metric is a measure ({', '.join(MEASURES)}), alone or with the "
        f"name of a network ({', '.join(networks) or 'none given'}), or one of "
        f"{', '.join(special)}.{did_you_mean(name, known)}"
    )
