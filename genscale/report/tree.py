"""The genealogy of a search as inline SVG: generations from left to right, who lived on is bold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from genscale.report.markup import Markup, element, join, number

_COLUMN, _ROW, _MARGIN = 64, 16, 22
_MOST = 24  # generations drawn; of longer searches the first and the last


def genealogy(tree: Sequence[dict[str, Any]], title: str) -> Markup:
    """Draw one prompt's tree.

    Args:
        tree: generations in order, each with ``event``, ``step``, ``parents`` (places in the
            generation before, -1 for none) and ``reward`` (None where it is not known).
        title: above it.
    """
    shown = _shortened(tree)
    if not shown:
        return Markup("")
    living = _living(shown)
    tallest = max(len(generation["parents"]) for generation in shown)
    width = _MARGIN * 2 + _COLUMN * (len(shown) - 1) + 40
    height = _MARGIN * 2 + _ROW * max(tallest - 1, 1)
    lines, dots = [], []
    for column, generation in enumerate(shown):
        x = _MARGIN + _COLUMN * column
        for row, parent in enumerate(generation["parents"]):
            y = _MARGIN + _ROW * row
            kind = "line s0" if row in living[column] else "faint s0"
            if column and parent >= 0:
                start = f"{x - _COLUMN},{_MARGIN + _ROW * parent}"
                lines.append(element("polyline", points=f"{start} {x},{y}", class_=kind))
            value = generation["reward"][row]
            words = f"{generation['event']}, step {generation['step'][row]}"
            words += "" if value is None else f", reward {number(value)}"
            alive = "dot s0" if row in living[column] else "dot s5"
            dots.append(element("circle", element("title", words), cx=x, cy=y, r=4, class_=alive))
        label = f"{generation['event']} {generation['step'][0] if generation['step'] else ''}"
        dots.append(element("text", label, x=x, y=height - 4, class_="x"))
    svg = element(
        "svg",
        join(*lines, *dots),
        viewBox=f"0 0 {width} {height + 6}",
        style=f"max-width: {width}px",
        role="img",
        aria_label=title,
    )
    return element("figure", element("figcaption", title), svg, class_="chart")


def _shortened(tree: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(tree) <= _MOST:
        return list(tree)
    later = [dict(generation) for generation in tree[-(_MOST - 1) :]]
    later[0]["parents"] = [-1] * len(later[0]["parents"])  # what came between is not drawn
    return [tree[0], *later]


def _living(tree: Sequence[dict[str, Any]]) -> list[set[int]]:
    """Return, generation by generation, the places that the last one descends from."""
    if not tree:
        return []
    living = [set(range(len(tree[-1]["parents"])))]
    for generation in reversed(tree[1:]):
        parents = (generation["parents"][row] for row in living[0])
        living.insert(0, {parent for parent in parents if parent >= 0})
    return living
