"""The report of a search: what it cost, what it raised, and the pictures before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genscale.io.files import atomic_write
from genscale.report.markup import Markup, duration, element, number
from genscale.report.page import whole_page
from genscale.report.pictures import picture
from genscale.report.tree import genealogy

_TREES = 6  # prompts whose genealogy is drawn
_COSTS = {
    "nfe": "network evaluations",
    "tokens": "token-forwards",
    "flops": "operations of the network",
    "eflops": "operations and memory traffic (eFLOPs)",
    "decodes": "decodes",
    "reward_calls": "rewards",
    "held_out_calls": "held-out rewards",
    "backward_calls": "backward passes",
}


def write_search_report(folder: Path, record: dict[str, Any]) -> Path:
    """Write ``search.html`` beside ``search.json`` and the grids, which it shows.

    Args:
        folder: of the samples.
        record: what ``search.json`` holds.

    Returns:
        the path of the report.
    """
    samples = record["samples"]
    parts = [
        element(
            "header",
            element("h1", "Search"),
            element("p", record["search"], class_="where"),
            element("div", *_tiles(record), class_="tiles"),
        ),
        element("section", element("h2", "Rewards"), _rewards(record)),
        element("section", element("h2", "Before and after"), *_pictures(folder, record)),
        element("section", element("h2", "Cost of a sample"), _costs(record)),
        element("section", element("h2", "Genealogy"), *_trees(samples)),
    ]
    report = folder / "search.html"
    with atomic_write(report) as temporary:
        temporary.write_text(whole_page("Search", element("main", *parts)), encoding="utf-8")
    return report


def _tiles(record: dict[str, Any]) -> list[Markup]:
    facts = [
        ("samples", number(len(record["samples"]))),
        ("network evaluations a sample", number(record["cost"]["nfe"])),
        ("of one plain sample", number(record["plain_nfe"])),
        ("seconds", duration(record["seconds"])),
        ("bytes of state a particle", number(int(record["state_bytes"]))),
        ("rewards not finite", number(record["invalid"])),
    ]
    return [
        element("div", element("b", value), element("span", label), class_="tile")
        for label, value in facts
    ]


def _rewards(record: dict[str, Any]) -> Markup:
    """Return the mean of every reward before and after; the held-out ones are marked."""
    head = [element("th", word) for word in ("reward", "role", "without search", "with search")]
    rows = []
    for role, key in (("searched for", "rewards"), ("held out", "held_out")):
        after, before = record["means"][key], record["means_before"].get(key, {})
        for name, value in after.items():
            plain = before.get(name)
            cells = (name, role, "-" if plain is None else number(plain), number(value))
            rows.append(element("tr", *(element("td", cell) for cell in cells)))
    note = element(
        "p",
        "A search raises the reward it follows in any case; the held-out ones tell whether the "
        "samples are better.",
        class_="note",
    )
    return element("div", element("table", element("tr", *head), *rows), note, class_="scroll")


def _pictures(folder: Path, record: dict[str, Any]) -> list[Markup]:
    found = []
    for name, words in (("before.png", "without search"), ("grid.png", "with search")):
        if (folder / name).is_file():
            caption = f"{words}: the same seeds, in the same order"
            found.append(picture(folder / name, caption, alt=words))
    return found


def _costs(record: dict[str, Any]) -> Markup:
    rows = [
        element("tr", element("td", words), element("td", number(record["cost"][name])))
        for name, words in _COSTS.items()
        if record["cost"].get(name)
    ]
    rows += [
        element("tr", element("td", f"seconds in {kind}"), element("td", duration(value)))
        for kind, value in record["seconds_of"].items()
    ]
    return element("table", *rows)


def _trees(samples: Sequence[dict[str, Any]]) -> list[Markup]:
    trees = []
    for sample in samples[:_TREES]:
        asked = sample["prompt"] if sample["prompt"] is not None else f"class {sample['label']}"
        trees.append(genealogy(sample["tree"], f"{sample['id']}: {asked}"))
    return trees
