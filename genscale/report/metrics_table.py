"""Evaluations side by side, and never side by side when they were measured differently.

A protocol has two kinds of fields. Some say how the samples were made (guidance, sampler, steps,
weights): comparing these is what a table is for. All others say how the number was measured; two
evaluations that differ there go into different tables, with the difference in a sentence between.
"""

from __future__ import annotations

from typing import Any

from genscale.report.contents import Evaluation, mapping
from genscale.report.markup import Markup, duration, element, join, number, setting

# how samples were made: may differ between the columns of a table
_MADE = (
    "sampler",
    "steps",
    "nfe",
    "solver",
    "guidance",
    "guidance_scale",
    "guidance_interval",
    "network_dtype",
    "decoder_dtype",
    "weights",
)
_LOWER = ("fid", "sfid", "mifid", "fd_", "kid", "copy_rate")
_HIGHER = (
    *("precision", "recall", "density", "coverage", "inception_score"),
    *("label_agreement", "judge_accuracy", "samples_to_real", "scene_"),
    *("psnr", "ssim", "codes_used"),
)
_FIRST = ("floor", "chance", "std")  # what the value is to be read against
_NO_NEWS = ("seconds",)  # details that are the same story as the table's foot


def metric_tables(evaluations: list[Evaluation]) -> Markup:
    """Write all evaluations, oldest first; one table for each way of measuring."""
    groups: list[list[Evaluation]] = []
    for evaluation in evaluations:
        home = next((g for g in groups if not _differences(g[0], evaluation)), None)
        if home is None:
            groups.append([evaluation])
        else:
            home.append(evaluation)
    parts = []
    for index, group in enumerate(groups):
        if index:
            told = _differences(groups[0][0], group[0])
            parts.append(
                element(
                    "p",
                    "Measured differently from the first table, so its numbers are ",
                    element("strong", "not comparable"),
                    f" with those above: {'; '.join(told)}.",
                    class_="apart",
                )
            )
        parts.append(_table(group))
    return join(*parts)


def _differences(first: Evaluation, second: Evaluation) -> list[str]:
    """Say in which ways two evaluations were measured differently."""
    told: dict[str, None] = {}
    theirs = {str(row["name"]): str(row.get("protocol")) for row in second.metrics}
    for row in first.metrics:
        one, other = str(row.get("protocol")), theirs.get(str(row["name"]))
        if other is None or one == other:
            continue
        a, b = first.protocols.get(one), second.protocols.get(other)
        if a is None or b is None:
            told[f"protocols {one} and {other}, whose fields were not kept"] = None
            continue
        for name in sorted({*a, *b}):
            if name not in _MADE and a.get(name) != b.get(name):
                told[f"{name} {setting(a.get(name))} there, {setting(b.get(name))} here"] = None
    return list(told)


def _table(evaluations: list[Evaluation]) -> Markup:
    names = list(dict.fromkeys(str(row["name"]) for e in evaluations for row in e.metrics))
    heads = [element("th", e.name, scope="col") for e in evaluations]
    head = element("tr", element("th", "metric", scope="col"), *heads)
    rows = [
        element(
            "tr", element("th", _arrowed(name), scope="row"), *(_cell(e, name) for e in evaluations)
        )
        for name in names
    ]
    foot = [
        element("tr", element("th", label, scope="row"), *(element("td", v) for v in values))
        for label, values in _settings(evaluations)
    ]
    table = element(
        "table",
        element("thead", head),
        element("tbody", *rows),
        element("tfoot", *foot),
        class_="metrics",
    )
    return element("div", table, class_="scroll")


def _arrowed(name: str) -> Markup:
    """Write a metric's name with the direction in which it improves, where that is known."""
    if name.startswith(_LOWER):
        return join(name, " ", element("span", Markup("&darr;"), title="lower is better"))
    if name.startswith(_HIGHER):
        return join(name, " ", element("span", Markup("&uarr;"), title="higher is better"))
    return join(name)


def _cell(evaluation: Evaluation, name: str) -> Markup:
    row = next((row for row in evaluation.metrics if str(row["name"]) == name), None)
    if row is None:
        return element("td", "not measured", class_="missing")
    key = str(row.get("protocol"))
    known = key in evaluation.protocols
    href = f"#protocol-{key}" if known else None
    parts = [
        element("b", number(row.get("value"))),
        " ",
        element("a" if known else "span", key, class_="hash", href=href),
    ]
    found = mapping(row.get("details"))
    ordered = [*(label for label in _FIRST if label in found), *found]
    details = [
        f"{label.replace('_', ' ')} {number(found[label])}"
        for label in dict.fromkeys(ordered)
        if label not in _NO_NEWS and isinstance(found[label], int | float)
    ]
    if details:
        parts.append(element("small", ", ".join(details)))
    return element("td", *parts)


def _settings(evaluations: list[Evaluation]) -> list[tuple[str, list[str]]]:
    """Return the rows below the numbers: how the samples were made."""
    rows = [
        ("samples", [number(e.record.get("num_samples")) for e in evaluations]),
        ("weights", [_or_dash(e.record.get("weights")) for e in evaluations]),
        ("checkpoint", [_or_dash(e.record.get("checkpoint")) for e in evaluations]),
        ("sampler", [describe(e.record.get("sampler")) for e in evaluations]),
        ("guidance", [describe(e.record.get("guidance")) for e in evaluations]),
        (
            "network evaluations a sample",
            [_or_dash(e.record.get("nfe_per_sample")) for e in evaluations],
        ),
        (
            "time",
            [duration(e.record["seconds"]) if "seconds" in e.record else "-" for e in evaluations],
        ),
    ]
    return [(label, values) for label, values in rows if any(v != "-" for v in values)]


def describe(node: Any) -> str:
    """Write the settings of a sampler or guidance: class name, then what was set."""
    if not isinstance(node, dict):
        return _or_dash(node)
    target = str(node.get("_target_") or "").rpartition(".")[2]
    settings = [f"{k}={setting(v)}" for k, v in node.items() if k != "_target_" and v is not None]
    return " ".join([*([target] if target else []), *settings]) or "-"


def _or_dash(value: Any) -> str:
    return "-" if value is None else setting(value)


def protocol_list(evaluations: list[Evaluation]) -> Markup:
    """Write the fields of every protocol once, under its hash."""
    protocols: dict[str, dict[str, Any]] = {}
    users: dict[str, list[str]] = {}
    for evaluation in evaluations:
        protocols |= evaluation.protocols
        for row in evaluation.metrics:
            users.setdefault(str(row.get("protocol")), []).append(
                f"{row['name']} of {evaluation.name}"
            )
    parts = []
    for key, fields in protocols.items():
        shown = {name: value for name, value in fields.items() if value not in ("", None, [], 0)}
        rows = [
            element("tr", element("th", name, scope="row"), element("td", setting(value)))
            for name, value in sorted(shown.items())
        ]
        summary = element("summary", element("code", key), " ", ", ".join(users.get(key, [])))
        parts.append(element("details", summary, element("table", *rows), id=f"protocol-{key}"))
    return join(*parts)
