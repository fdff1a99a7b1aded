"""Agreement of pictures with captions of scenes, as one torchmetrics metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from genscale.data.scenes.grammar import COLOURS, SHAPES, Requirement, SceneObject, parse_caption
from genscale.data.scenes.oracle import agreement_of, read_scene
from genscale.metrics.captioned import CaptionedMetric, check_captions
from genscale.metrics.features import check_images

SCENE_MEASURES = ("scene_count", "scene_colour", "scene_shape", "scene_relation", "scene_all")
_MOST_OBJECTS = 16  # of a picture, the largest; a caption names six at most
_COLOURS = tuple(COLOURS)


class SceneAgreement(CaptionedMetric):
    """How well pictures show what their captions say, by the oracle of scenes.

    Every measure is the mean over the samples whose caption it applies to:

    - ``scene_count``: as many objects as the caption names.
    - ``scene_colour``: share of the named objects found with their colour and shape, one to one.
    - ``scene_shape``: share of the named objects found with their shape, one to one.
    - ``scene_relation``: two objects of the named colours and shapes lie as the caption says.
    - ``scene_all``: everything is as the caption says.

    Args:
        measures: names out of :data:`SCENE_MEASURES`.

    Raises:
        ConfigError: if a measure is unknown.
    """

    prefix = "scene"
    description = "scene_oracle_1"

    def __init__(self, measures: Sequence[str] = SCENE_MEASURES) -> None:
        super().__init__(measures, SCENE_MEASURES, "scenes", {"seen": (3, torch.float64)})

    def update(
        self,
        images: Tensor,
        captions: Sequence[str] | None = None,
        sample_ids: Tensor | None = None,
    ) -> None:
        """Read the scenes of pictures and keep them with the captions.

        Args:
            images: uint8 ``(B, 3, H, W)``.
            captions: what each picture was to show; None for samples without captions.
            sample_ids: ``(B,)`` int64 global numbers; on one process they may be left out.

        Raises:
            ConfigError: if a caption does not follow the grammar of scenes.
            DataError: if the number of captions is another, or the pictures are no RGB.
        """
        check_images(images)
        check_captions(captions, len(images))
        pictures = images.cpu().numpy()
        found = [read_scene(pictures[i]).objects for i in range(len(captions or ()))]
        found += [()] * (len(images) - len(found))
        self._keep(sample_ids, captions, as_rows(found, _MOST_OBJECTS))

    def _asked(self, caption: str) -> Requirement:
        return parse_caption(caption)

    def _seen(self, row: Tensor) -> list[SceneObject]:
        return as_objects(row.tolist())

    def _results(self, seen: list[SceneObject], asked: Requirement) -> Mapping[str, float | None]:
        return agreement_of(seen, asked).results()


def as_rows(objects: Sequence[Sequence[SceneObject]], most: int) -> Tensor:
    """Return objects of pictures as numbers: ``(len(objects), most, 5)`` float64, -1 for none."""
    rows = torch.full((len(objects), most, 5), -1.0, dtype=torch.float64)
    for i, found in enumerate(objects):
        for j, each in enumerate(found[:most]):
            kind = (SHAPES.index(each.shape), _COLOURS.index(each.colour))
            rows[i, j] = torch.tensor([*kind, each.x, each.y, each.size], dtype=torch.float64)
    return rows


def as_objects(rows: list[list[float]]) -> list[SceneObject]:
    """Return the objects of one picture that :func:`as_rows` wrote."""
    return [
        SceneObject(SHAPES[int(shape)], _COLOURS[int(colour)], x, y, size)
        for shape, colour, x, y, size in rows
        if shape >= 0
    ]
