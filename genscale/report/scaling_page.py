"""The report of a scaling study: rewards against every cost, held-out rewards beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genscale.io.files import atomic_write
from genscale.report.charts import Line, line_chart
from genscale.report.markup import Markup, element, join, number
from genscale.report.page import whole_page
from genscale.report.pictures import picture

_COSTS = {
    "nfe": "network evaluations a sample",
    "tokens": "token-forwards a sample",
    "eflops": "eFLOPs a sample",
    "seconds": "seconds a sample",
}


def write_scaling_report(
    folder: Path, settings: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> Path:
    """Write ``scaling.html``.

    Args:
        folder: of the study.
        settings: what all cells share.
        rows: a method and budget each; see :func:`genscale.cli.scaling_results.summarise`.

    Returns:
        the path of the report.
    """
    report = folder / "scaling.html"
    header = element(
        "header",
        element("h1", "Scaling study"),
        element(
            "p", f"run {settings['run']}, {settings['num_prompts']} prompts a seed", class_="where"
        ),
    )
    parts = [header, *_curves(rows), _table(rows), _pictures(folder, rows)]
    with atomic_write(report) as temporary:
        temporary.write_text(whole_page("Scaling study", element("main", *parts)), encoding="utf-8")
    return report


def _curves(rows: Sequence[dict[str, Any]]) -> list[Markup]:
    """Return a section for each reward, searched for first, with a chart for each cost."""
    sections = []
    parts = [name for name in rows[0]["rewards"] if name != "reward"]
    for kind, role, names in (
        ("rewards", "searched for", ["reward"]),
        ("held_out", "held out", list(rows[0]["held_out"])),
        ("rewards", "a part of what is searched for", parts),
    ):
        for name in names:
            charts = [_chart(rows, kind, name, cost, words) for cost, words in _COSTS.items()]
            shown = [chart for chart in charts if chart]
            sections.append(
                element(
                    "section",
                    element("h2", f"{name}, {role}"),
                    element("div", *shown, class_="row"),
                )
            )
    note = element(
        "p", "Bands are 95 % intervals of the mean over prompts and seeds.", class_="note"
    )
    return [*sections, note]


def _chart(rows: Sequence[dict[str, Any]], kind: str, name: str, cost: str, words: str) -> Markup:
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "none"):
        known = [r for r in rows if r["method"] == method and name in r[kind]]
        own = sorted(known, key=lambda row: _cost(row, cost))
        points = [(_cost(row, cost), row[kind][name]["mean"]) for row in own]
        halves = [row[kind][name]["half"] or 0.0 for row in own]
        band = [(y - half, y + half) for (_, y), half in zip(points, halves, strict=True)]
        if points and all(x > 0 for x, _ in points):
            lines.append(Line(method, points, band=band))
    if not lines:
        return Markup("")
    return line_chart(name, lines, logarithmic=False, x_label=words, logarithmic_x=True)


def interval(value: dict[str, float | None] | None) -> str:
    """Write a mean with half the width of its 95 % interval."""
    if value is None or value["mean"] is None:
        return "-"
    half = "" if value["half"] is None else f" +- {value['half']:.3f}"
    return f"{value['mean']:.3f}{half}"


def _cost(row: dict[str, Any], name: str) -> float:
    return float(row["seconds"] if name == "seconds" else row["cost"][name])


def _table(rows: Sequence[dict[str, Any]]) -> Markup:
    names = [(kind, name) for kind in ("rewards", "held_out") for name in rows[0][kind]]
    head = ["method", "budget", "samples", *(name for _, name in names)]
    head += ["evaluations", "rewards", "decodes", "eFLOPs", "seconds"]
    body = []
    for row in rows:
        cells = [row["method"], f"{row['budget']:g}x", number(row["samples"])]
        for kind, name in names:
            cells.append(interval(row[kind].get(name)))
        cost = row["cost"]
        cells += [f"{cost['nfe']:.1f}", f"{cost['reward_calls']:.1f}", f"{cost['decodes']:.1f}"]
        cells += [number(cost["eflops"]), number(row["seconds"])]
        body.append(element("tr", *(element("td", cell) for cell in cells)))
    title = element("h2", "All cells")
    whole = element("table", element("tr", *(element("th", word) for word in head)), *body)
    return element("section", title, element("div", whole, class_="scroll"))


def _pictures(folder: Path, rows: Sequence[dict[str, Any]]) -> Markup:
    """Show the first prompts without search and at each method's largest budget."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        budget = max(row["budget"] for row in rows if row["method"] == method)
        files = sorted((folder / "cells").glob(f"{method}-{budget:g}x-seed*.png"))
        if files:
            words = "without search" if method == "none" else f"{method} at {budget:g} times"
            found.append(picture(files[0], words, alt=words))
    if not found:
        return Markup("")
    return element("section", element("h2", "Pictures of the same prompts"), join(*found))
