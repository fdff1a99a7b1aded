"""Markup, numbers and charts of the report."""

from __future__ import annotations

import math
import re

import pytest

from genscale.report.charts import Line, line_chart
from genscale.report.markup import Markup, count, duration, element, join, number, setting


def test_text_is_escaped_once_and_markup_never():
    inner = element("b", "a < b & c")
    assert inner == "<b>a &lt; b &amp; c</b>"
    assert element("p", inner, " <") == "<p><b>a &lt; b &amp; c</b> &lt;</p>"
    assert element("a", "x", href='"><script>', class_="y", id=None) == (
        '<a href="&quot;&gt;&lt;script&gt;" class="y">x</a>'
    )
    assert isinstance(join("a", Markup("<i></i>")), Markup)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (0.5, "0.5000"),
        (3.14159, "3.142"),
        (12.3456, "12.35"),
        (123.456, "123.5"),
        (1234.5, "1,234"),
        (0.00012345, "0.000123"),
        (1.5e-7, "1.5e-07"),
        (2e7, "2e+07"),
        (-2.5, "-2.500"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (None, "none"),
        (True, "True"),
        ("text", "text"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.0, "2"),
        (0.25, "0.25"),
        (60, "60"),
        ([["k", 3], ["subset", 100.0]], "k=3, subset=100"),
        ([0.1, 0.9], "0.1, 0.9"),
        ("ema", "ema"),
    ],
)
def test_settings(value, text):
    assert setting(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12, "12"),
        (19_200, "19.2 k"),
        (1_234_567, "1.23 M"),
        (7e9, "7 G"),
        (math.inf, "inf"),
        ("?", "?"),
    ],
)
def test_counts(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.5, "0.5 s"),
        (59.94, "59.9 s"),
        (61, "1 min 1 s"),
        (3700, "1 h 1 min"),
        (90_000, "1 d 1 h"),
        (math.nan, "nan"),
        ("long", "long"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def coordinates(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline points="([^"]*)"', svg)
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in lines]


def test_a_straight_line_is_drawn_straight_and_inside_the_frame():
    svg = line_chart("x", [Line("x", [(0, 0.0), (50, 5.0), (100, 10.0)])])
    (points,) = coordinates(svg)
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 == (x0 + x2) / 2
    assert y1 == (y0 + y2) / 2
    assert y2 < y0  # upwards on the screen
    assert "optimizer steps" in svg


def test_values_over_several_decades_get_a_logarithmic_axis():
    svg = line_chart("x", [Line("x", [(0, 100.0), (50, 10.0), (100, 1.0)])])
    (points,) = coordinates(svg)
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.11)
    for label in (">1<", ">10<", ">100<"):
        assert label in svg


def test_a_constant_has_a_chart_too():
    (points,) = coordinates(line_chart("x", [Line("x", [(1, 0.0), (2, 0.0)])]))
    assert points[0][1] == points[1][1]


def test_long_series_are_thinned_and_keep_their_last_value():
    svg = line_chart(
        "x", [Line("x", [(i, float(i % 7)) for i in range(10_001)] + [(10_001, 99.0)])]
    )
    (points,) = coordinates(svg)
    assert len(points) <= 400
    assert "99.00" in svg


def test_smoothing_keeps_a_constant_and_calms_an_alternation():
    flat, zigzag = [[(i, f(i)) for i in range(200)] for f in (lambda _: 3.0, lambda i: (-1.0) ** i)]
    raw, smooth = coordinates(line_chart("x", [Line("flat", flat, smooth=True)]))
    assert {y for _, y in smooth} == {y for _, y in raw}
    raw, smooth = coordinates(line_chart("x", [Line("zigzag", zigzag, smooth=True)]))
    spread = [max(y for _, y in line) - min(y for _, y in line) for line in (raw, smooth)]
    # a window of 11 alternating ones averages to 1/11; the frame clips nothing here
    assert spread[1] < spread[0] / 4
