"""Line charts as inline SVG: crisp at any size, coloured by the page's style sheet.

Drawn by hand rather than by a plotting library: the colours follow light and dark, the text is
text, and the same numbers give the same bytes everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from genscale.report.markup import Markup, count, element, join, number

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 520, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 34
_MAX_POINTS = 400  # a line of more points than pixels says nothing more
_COLOURS = 6  # the style sheet knows --c0 to --c5


@dataclass(frozen=True, slots=True)
class Line:
    """One quantity over the steps.

    Args:
        name: for the legend.
        points: (step, value), by step.
        smooth: draw centred averages, with the values themselves behind it.
        band: (low, high) around every point, drawn behind the line; empty for none.
    """

    name: str
    points: Points
    smooth: bool = False
    band: Points = ()


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    logarithmic: bool | None = None,
    x_label: str = "optimizer steps",
    logarithmic_x: bool = False,
) -> Markup:
    """Draw lines over a common axis.

    Args:
        title: above the chart.
        lines: at least one of them with a point.
        logarithmic: y axis; None chooses it for positive values that span a factor of 10.
        x_label: what the axis counts.
        logarithmic_x: x axis, for positive values.
    """
    lines = [line for line in lines if line.points]
    drawn = [_thin(_smooth(line.points) if line.smooth else line.points) for line in lines]
    behind = [_thin(line.points) if line.smooth else [] for line in lines]
    values = [y for points in drawn for _, y in points]
    values += [y for points in behind for y in _middle([y for _, y in points])]
    values += [bound for line in lines for pair in line.band for bound in pair]
    if logarithmic is None:
        logarithmic = min(values) > 0 and max(values) / min(values) > 10
    along = _Axis.logarithmic if logarithmic_x else _Axis.linear
    x_axis = along([x for points in drawn for x, _ in points], _LEFT, WIDTH - _RIGHT)
    y_axis = (_Axis.logarithmic if logarithmic else _Axis.linear)(values, HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(x_axis, y_axis, x_label)]
    for index, line in enumerate(lines):
        if line.band:
            parts.append(_band(line, x_axis, y_axis, index))
    for index, points in enumerate(behind):
        if points:
            parts.append(_path(points, x_axis, y_axis, f"faint s{index % _COLOURS}"))
    for index, (line, points) in enumerate(zip(lines, drawn, strict=True)):
        parts.append(_path(points, x_axis, y_axis, f"line s{index % _COLOURS}"))
        if len(points) <= 30 and not line.smooth:
            parts += [_dot(line.name, p, x_axis, y_axis, index, x_label) for p in points]
    svg = element(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title} over {x_label}",
    )
    legend = element("p", *_legend(lines, drawn), class_="legend")
    return element("figure", element("figcaption", title), legend, svg, class_="chart")


def _legend(lines: Sequence[Line], drawn: Sequence[Points]) -> list[Markup]:
    """Name every line with its last value."""
    items = []
    for index, (line, points) in enumerate(zip(lines, drawn, strict=True)):
        swatch = element("i", class_=f"swatch b{index % _COLOURS}")
        items.append(element("span", swatch, f" {line.name} ", element("b", number(points[-1][1]))))
    return items


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps values to pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool
    ticks: tuple[float, ...]

    @classmethod
    def linear(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = min(values), max(values)
        if low == high:
            margin = abs(low) * 0.1 or 1.0
            low, high = low - margin, high + margin
        step = _round_step((high - low) / 4)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        ticks = tuple(i * step for i in range(first, last + 1))
        return cls(low, high, start, end, False, ticks)

    @classmethod
    def logarithmic(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = math.log10(min(values)), math.log10(max(values))
        powers = range(math.floor(low), math.ceil(high) + 1)
        for mantissas in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
            ticks = tuple(
                m * 10.0**p
                for p in powers
                for m in mantissas
                if low <= math.log10(m * 10.0**p) <= high
            )
            if len(ticks) >= 3:
                break
        return cls(low, high, start, end, True, ticks)

    def __call__(self, value: float) -> float:
        position = math.log10(max(value, 1e-300)) if self.is_log else value
        share = (position - self.low) / ((self.high - self.low) or 1.0)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def _round_step(step: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= step * 0.999)


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str) -> Markup:
    parts = []
    for tick in y_axis.ticks:
        y = f"{y_axis(tick):.1f}"
        parts.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        label = element("text", _label(tick), x=_LEFT - 7, y=y, class_="y")
        parts.append(label)
    for tick in x_axis.ticks:
        x = f"{x_axis(tick):.1f}"
        parts.append(element("text", _label(tick), x=x, y=HEIGHT - _BOTTOM + 16, class_="x"))
    base = HEIGHT - _BOTTOM
    parts.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=base, y2=base, class_="axis"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(element("text", x_label, x=middle, y=HEIGHT - 4, class_="x unit"))
    return join(*parts)


def _label(value: float) -> str:
    """Write a tick: no more digits than it has."""
    if abs(value) >= 1000:
        return count(value)
    return f"{value:.6g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.0e}"


def _path(points: Points, x_axis: _Axis, y_axis: _Axis, kind: str) -> Markup:
    words = [f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in points]
    return element("polyline", points=" ".join(words), class_=kind)


def _band(line: Line, x_axis: _Axis, y_axis: _Axis, index: int) -> Markup:
    pairs = list(zip(line.points, line.band, strict=True))
    around = [(x, low) for (x, _), (low, _) in pairs]
    around += [(x, high) for (x, _), (_, high) in reversed(pairs)]
    words = [f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in around]
    return element("polygon", points=" ".join(words), class_=f"band b{index % _COLOURS}")


def _dot(
    name: str, point: tuple[float, float], x_axis: _Axis, y_axis: _Axis, index: int, x_label: str
) -> Markup:
    title = element("title", f"{name}: {number(point[1])} at {number(int(point[0]))} {x_label}")
    x, y = f"{x_axis(point[0]):.1f}", f"{y_axis(point[1]):.1f}"
    return element("circle", title, cx=x, cy=y, r=3, class_=f"dot s{index % _COLOURS}")


def _smooth(points: Points) -> list[tuple[float, float]]:
    """Return centred averages over about a twentieth of the points: no lag behind the values."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    half = len(points) // 40
    smoothed = []
    for index, (x, _) in enumerate(points):
        low, high = max(index - half, 0), min(index + half + 1, len(points))
        smoothed.append((x, (sums[high] - sums[low]) / (high - low)))
    return smoothed


def _middle(values: Sequence[float]) -> Sequence[float]:
    """Leave out the lowest and highest fiftieth: outliers may be cut off by the frame."""
    cut = len(values) // 50
    return sorted(values)[cut : len(values) - cut]


def _thin(points: Points) -> list[tuple[float, float]]:
    """Return means of neighbouring points where there are too many; the last one stays."""
    size = math.ceil(len(points) / _MAX_POINTS)
    if size <= 1:
        return list(points)
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]
    return [*means[:-1], points[-1]]
