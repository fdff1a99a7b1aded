"""Which scenes there are, and how they become pixels."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from genscale.data.scenes.grammar import BACKGROUNDS, COLOURS, SHAPES, TASKS, Scene, SceneObject
from genscale.data.scenes.renderer import points_per_pixel, render
from genscale.data.scenes.sampling import GAP, MARGIN, SMALLEST, CaptionedScene, scene_at

# shares of a box of side 2: disc pi/4; cross 1 - 4/9; ring pi/4 (1 - 0.4^2)
FILLED = {"circle": 0.7854, "square": 1.0, "triangle": 0.5, "cross": 0.5556, "ring": 0.6597}


@pytest.fixture(scope="module")
def drawn() -> list[CaptionedScene]:
    return [scene_at(3, index, TASKS, 6) for index in range(600)]


def test_objects_keep_the_margin_and_the_gap(drawn: list[CaptionedScene]) -> None:
    for scene in (each.scene for each in drawn):
        for one in scene.objects:
            assert one.size >= SMALLEST
            for centre in (one.x, one.y):
                assert centre - one.size / 2 >= MARGIN - 1e-9
                assert centre + one.size / 2 <= 1 - MARGIN + 1e-9
        for one, other in combinations(scene.objects, 2):
            between = max(abs(one.x - other.x), abs(one.y - other.y))
            assert between - (one.size + other.size) / 2 >= GAP - 1e-9


@pytest.mark.parametrize("index", [217, 484, 817, 828])
def test_pairs_that_have_no_room_get_other_sizes(index: int) -> None:
    # the first sizes drawn for these rows fit nowhere, or nearly so
    scene = scene_at(0, index, ["relation"], 6).scene
    one, other = scene.objects
    apart = max(abs(one.x - other.x), abs(one.y - other.y))
    assert apart >= (one.size + other.size) / 2 + GAP - 1e-9


def test_all_kinds_come_up(drawn: list[CaptionedScene]) -> None:
    tasks = Counter(each.task for each in drawn)
    assert set(tasks) == set(TASKS)
    assert min(tasks.values()) > 80  # 120 of 600 are expected, with a spread of 10
    counts = Counter(len(each.scene.objects) for each in drawn if each.task == "count")
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    objects = [one for each in drawn for one in each.scene.objects]
    assert {one.shape for one in objects} == set(SHAPES)
    assert {one.colour for one in objects} == set(COLOURS)
    assert {each.scene.background for each in drawn} == set(BACKGROUNDS)


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    assert scene_at(3, 17, TASKS, 6) == scene_at(3, 17, TASKS, 6)
    others = [scene_at(3, 18, TASKS, 6), scene_at(4, 17, TASKS, 6)]
    assert all(other != scene_at(3, 17, TASKS, 6) for other in others)


def test_max_objects_bounds_every_kind_of_scene() -> None:
    for index in range(150):
        assert len(scene_at(0, index, ("count", "multi"), 2).scene.objects) <= 2
        assert len(scene_at(0, index, ("multi",), 3).scene.objects) in (2, 3)


def test_the_same_scene_gives_the_same_bytes(drawn: list[CaptionedScene]) -> None:
    for each in drawn[:20]:
        assert np.array_equal(render(each.scene, 32), render(each.scene, 32))


@pytest.mark.parametrize(("small", "large"), [(16, 32), (32, 64), (32, 128), (24, 48), (48, 96)])
def test_resolutions_of_one_grid_are_box_downsamplings(
    drawn: list[CaptionedScene], small: int, large: int
) -> None:
    factor = large // small
    for each in drawn[:30]:
        fine = render(each.scene, large).astype(np.float64)
        down = fine.reshape(3, small, factor, small, factor).mean((2, 4))
        # both were rounded to whole levels; nothing else differs
        assert np.abs(down - render(each.scene, small)).max() <= 1.0


def test_finer_grids_differ_at_edges_only(drawn: list[CaptionedScene]) -> None:
    for each in drawn[:10]:
        fine = render(each.scene, 256).astype(np.float64)
        down = fine.reshape(3, 64, 4, 64, 4).mean((2, 4))
        difference = np.abs(down - render(each.scene, 64))
        assert difference.mean() < 1.0
        assert difference.max() <= 255 / 8 + 1  # a pixel of 64 has 8 points along an edge


def test_there_are_four_points_a_pixel_and_axis_or_more() -> None:
    assert [points_per_pixel(r) for r in (16, 32, 64, 128, 256, 512)] == [32, 16, 8, 4, 4, 4]
    assert [points_per_pixel(r) for r in (20, 100, 500)] == [32, 8, 4]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_share_of_its_box(shape: str) -> None:
    one = SceneObject(shape, "white", 0.5, 0.5, 0.5)  # type: ignore[arg-type]
    image = render(Scene("black", (one,)), 128)
    assert image.shape == (3, 128, 128)
    assert image.dtype == np.uint8
    share = image[0].sum() / 255 / 64**2
    assert share == pytest.approx(FILLED[shape], abs=0.004)  # 256 points a side of the box
    rows, columns = np.nonzero(image[0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (32, 95, 32, 95)


def test_colours_are_those_of_the_palette_on_the_background() -> None:
    for colour, levels in COLOURS.items():
        one = SceneObject("square", colour, 0.5, 0.5, 0.25)
        image = render(Scene("navy", (one,)), 64)
        assert tuple(image[:, 32, 32]) == levels
        assert tuple(image[:, 0, 0]) == BACKGROUNDS["navy"]


def test_a_triangle_points_up_and_y_runs_downwards() -> None:
    one = SceneObject("triangle", "red", 0.5, 0.25, 0.4)
    image = render(Scene("black", (one,)), 64)
    widths = (image[0] > 127).sum(1)
    assert widths[32:].sum() == 0
    assert (np.diff(widths[widths > 0]) >= 0).all()
