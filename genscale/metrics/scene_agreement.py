"""Agreement of pictures with captions of scenes, as one torchmetrics metric."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genscale.data.scenes.grammar import COLOURS, SHAPES, Requirement, SceneObject, parse_caption
from genscale.data.scenes.oracle import agreement_of, read_scene
from genscale.errors import ConfigError, DataError, did_you_mean
from genscale.metrics.features import check_images
from genscale.metrics.keyed import KeyedMetric

SCENE_MEASURES = ("scene_count", "scene_colour", "scene_shape", "scene_relation", "scene_all")
_CAPTION_BYTES = 128  # the longest caption of six objects has 121
_MOST_OBJECTS = 16  # of a picture, the largest; a caption names six at most
_SHIFTS = 8  # foreign captions that every picture is held against for the level of chance
_COLOURS = tuple(COLOURS)


class SceneAgreement(KeyedMetric):
    """How well pictures show what their captions say, by the oracle of scenes.

    Every measure is the mean over the samples whose caption it applies to:

    - ``scene_count``: as many objects as the caption names.
    - ``scene_colour``: share of the named objects found with their colour and shape, one to one.
    - ``scene_shape``: share of the named objects found with their shape, one to one.
    - ``scene_relation``: two objects of the named colours and shapes lie as the caption says.
    - ``scene_all``: everything is as the caption says.

    The details of each give its level of chance: the same pictures against captions of other
    samples (up to eight each, a fixed choice). A model that ignores its captions scores that.

    Args:
        measures: names out of :data:`SCENE_MEASURES`.

    Attributes:
        description: name of the oracle in protocols; the number grows when its rules change.

    Raises:
        ConfigError: if a measure is unknown.
    """

    description = "scene_oracle_1"

    def __init__(self, measures: Sequence[str] = SCENE_MEASURES) -> None:
        for name in measures:
            if name not in SCENE_MEASURES:
                raise ConfigError(
                    f"'{name}' is no measure of scenes. Known are {', '.join(SCENE_MEASURES)}."
                    f"{did_you_mean(name, SCENE_MEASURES)}"
                )
        super().__init__(measures, {"captions": (2, torch.uint8), "objects": (3, torch.float64)})

    def update(
        self,
        images: Tensor,
        captions: Sequence[str] | None = None,
        sample_ids: Tensor | None = None,
    ) -> None:
        """Read the scenes of pictures and keep them with the captions.

        Args:
            images: uint8 ``(B, 3, H, H)``.
            captions: what each picture was to show; None for samples without captions.
            sample_ids: ``(B,)`` int64 global numbers; on one process they may be left out.

        Raises:
            ConfigError: if a caption does not follow the grammar of scenes.
            DataError: if the number of captions is another, or the pictures are no square RGB.
        """
        check_images(images)
        if captions is not None and len(captions) != len(images):
            raise DataError(
                f"{len(images)} images came with {len(captions)} captions. Give one an image."
            )
        images = images.cpu()
        texts = torch.zeros(len(images), _CAPTION_BYTES, dtype=torch.uint8)
        objects = torch.full((len(images), _MOST_OBJECTS, 5), -1.0, dtype=torch.float64)
        for i, caption in enumerate(captions or ()):
            text = str(parse_caption(caption)).encode()
            texts[i, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            found = read_scene(images[i].numpy()).objects[:_MOST_OBJECTS]
            for j, each in enumerate(found):
                kind = (SHAPES.index(each.shape), _COLOURS.index(each.colour))
                objects[i, j] = torch.tensor([*kind, each.x, each.y, each.size])
        self._append(sample_ids, len(images), {"captions": texts, "objects": objects})

    def compute(self) -> dict[str, float]:
        """Return every active measure by name, as far as it applies to some caption.

        Returns:
            The measures; an empty dict if no sample has a caption. :attr:`details` holds for each
            the number of samples it applies to and its level of chance.

        Raises:
            DataError: if there are no samples.
        """
        started = time.perf_counter()
        _, rows = self.collected()
        captioned = rows["captions"][:, 0] > 0
        asked = [_requirement(row) for row in rows["captions"][captioned].numpy()]
        seen = [_objects(row) for row in rows["objects"][captioned].tolist()]
        own = _means(asked, seen)
        shifts = range(1, min(_SHIFTS + 1, len(asked)))
        foreign = [each for by in shifts for each in asked[by:] + asked[:by]]
        chance = _means(foreign, seen * len(shifts))
        seconds = round((time.perf_counter() - started) / max(1, len(self.active)), 3)
        values: dict[str, float] = {}
        self.details = {}
        for name in self.active:
            if name not in own:
                continue
            values[name], count = own[name]
            self.details[name] = {"n": count, "seconds": seconds}
            if name in chance:
                self.details[name]["chance"] = chance[name][0]
        return values


def _requirement(row: NDArray[np.uint8]) -> Requirement:
    return parse_caption(row.tobytes().rstrip(b"\0").decode())


def _objects(rows: list[list[float]]) -> list[SceneObject]:
    return [
        SceneObject(SHAPES[int(shape)], _COLOURS[int(colour)], x, y, size)
        for shape, colour, x, y, size in rows
        if shape >= 0
    ]


def _means(
    asked: Sequence[Requirement], seen: Sequence[Sequence[SceneObject]]
) -> dict[str, tuple[float, int]]:
    """Return mean and number of the results of every measure that applies to some caption."""
    results: dict[str, list[float]] = {}
    for requirement, objects in zip(asked, seen, strict=True):
        for task, result in agreement_of(objects, requirement).results().items():
            if result is not None:
                results.setdefault(f"scene_{task}", []).append(result)
    return {name: (sum(each) / len(each), len(each)) for name, each in results.items()}
