"""The parts of a report; each says plainly when there is nothing to show."""

from __future__ import annotations

import shlex
from typing import Any

from genscale.report.charts import Line, line_chart
from genscale.report.contents import Evaluation, RunContents, mapping
from genscale.report.markup import Markup, count, duration, element, number
from genscale.report.metrics_table import describe, metric_tables, protocol_list
from genscale.report.pictures import picture

_MAX_SAMPLE_SETS = 4
_USAGE = "train/usage/"  # of each scale of a tokenizer
_SEPARATE = {
    "train/learning_rate": "learning rate",
    "train/gradient_norm": "gradient norm",
    "train/samples_per_second": "samples per second",
    "train/mfu": "model FLOP utilisation",
    "train/skipped_steps": "skipped steps",
}


def section(title: str, *parts: str) -> Markup:
    """Return a titled section."""
    return element("section", element("h2", title), *parts)


def missing(sentence: str, command: str | None = None) -> Markup:
    """Return a sentence in place of what is not there, with the command that makes it."""
    parts: list[str] = [sentence]
    if command:
        parts += [" ", element("code", command)]
    return element("p", *parts, class_="missing")


def headline(run: RunContents) -> Markup:
    """Return the title and the numbers one looks for first."""
    last = run.rows[-1] if run.rows else {}
    steps = run.summary.get("steps", last.get("step"))
    losses = run.series("train/loss")
    facts: list[tuple[str, Any]] = [
        ("optimizer steps", None if steps is None else number(steps)),
        ("samples seen", _maybe(count, run.summary.get("samples_seen", last.get("samples_seen")))),
        ("parameters", _maybe(count, run.summary.get("parameters"))),
        ("GFLOPs a sample", _maybe(number, run.summary.get("gflops"))),
        ("training time", _maybe(duration, run.summary.get("seconds", last.get("seconds")))),
        ("last loss", number(losses[-1][1]) if losses else None),
    ]
    newest = run.evaluations[-1].metrics if run.evaluations else []
    facts += [(f"{row['name']}, newest evaluation", number(row.get("value"))) for row in newest[:2]]
    tiles = [
        element("div", element("b", value), element("span", label), class_="tile")
        for label, value in facts
        if value is not None
    ]
    device = run.environment.get("device") or run.summary.get("device")
    words = [run.shown_path, *([str(device)] if device else [])]
    if not run.summary:
        words.append("no summary.json: still running, or stopped before its end")
    return element(
        "header",
        element("h1", run.name),
        element("p", " | ".join(words), class_="where"),
        element("div", *tiles, class_="tiles"),
    )


def _maybe(write: Any, value: Any) -> str | None:
    return None if value is None else str(write(value))


def newest_samples(run: RunContents) -> Markup:
    """Show what the model makes: the grid of the newest evaluation, or the next best thing."""
    title = "Pictures and their reconstructions" if _reconstructs(run) else "Samples"
    for evaluation in reversed(run.evaluations):
        if evaluation.grid:
            made = [
                f"{number(evaluation.record.get('num_samples'))} samples evaluated",
                describe(evaluation.record.get("sampler")),
                describe(evaluation.record.get("guidance")),
            ]
            caption = f"evaluations/{evaluation.name}: {', '.join(w for w in made if w != '-')}"
            return section(title, picture(evaluation.grid, caption, alt=title.lower()))
    if run.step_grids and not run.sample_sets:
        step, path = list(run.step_grids.items())[-1]
        shown = picture(path, f"training, step {step:,}", alt=title.lower())
        return section(title, shown)
    if run.sample_sets:
        return Markup("")  # shown in a section of their own
    command = f"python sample.py run={shlex.quote(run.shown_path)}"
    return section("Samples", missing("There are no samples yet. Make some with:", command))


def metrics(run: RunContents) -> Markup:
    """Show all evaluations, a column each."""
    if not run.evaluations:
        command = f"python evaluate.py run={shlex.quote(run.shown_path)}"
        return section("Metrics", missing("There is no evaluation yet. Make one with:", command))
    note = element(
        "p",
        "The eight digits beside a number name the protocol it was computed under; ",
        "its fields are listed below.",
        class_="note",
    )
    return section("Metrics", metric_tables(run.evaluations), note)


def curves(run: RunContents) -> Markup:
    """Show losses, learning rate, gradient norm, throughput, and metrics during training."""
    charts = []
    losses = [
        Line(name.removeprefix("train/"), run.series(name), smooth=True)
        for name in run.series_names("train/loss")
    ]
    losses = [line for line in losses if line.points]
    if losses:
        charts.append(line_chart("loss", losses))
    usage = run.series_names(_USAGE)
    scales = [Line(name.removeprefix(_USAGE), run.series(name)) for name in usage]
    if any(line.points for line in scales):
        title = "share of the codebook in use, by scale"
        charts.append(line_chart(title, scales, logarithmic=False))
    others = [n for n in run.series_names("train/") if n not in (*_SEPARATE, *usage)]
    others = [name for name in others if "loss" not in name]
    for name in [*_SEPARATE, *(n for n in others if n != "train/gflops_per_second")]:
        points = run.series(name)
        if not points or (name == "train/skipped_steps" and not any(y for _, y in points)):
            continue
        label = _SEPARATE.get(name, name.removeprefix("train/").replace("_", " "))
        noisy = name in ("train/gradient_norm", "train/samples_per_second")
        is_log = None if name == "train/gradient_norm" else False
        charts.append(line_chart(label, [Line(label, points, smooth=noisy)], logarithmic=is_log))
    for name in run.series_names("eval/"):
        points = run.series(name)
        if points:
            label = name.removeprefix("eval/")
            charts.append(line_chart(label, [Line(label, points)], logarithmic=False))
    if not charts:
        return section("Curves", missing("Nothing was logged in metrics.jsonl."))
    parts: list[str] = [element("div", *charts, class_="charts")]
    notes = []
    if losses:
        notes.append("Strong lines are centred averages over a twentieth of the rows.")
    if run.torn_lines:
        lines = "line" if run.torn_lines == 1 else "lines"
        notes.append(f"{run.torn_lines} torn {lines} of metrics.jsonl left out.")
    if bad := run.non_finite_rows():
        notes.append(f"Rows with a value that is not finite, which is not drawn: {bad}.")
    if notes:
        parts.append(element("p", " ".join(notes), class_="note"))
    return section("Curves", *parts)


def _reconstructs(run: RunContents) -> bool:
    """Return whether the run's grids are pictures, and what was made of them: not of a backbone."""
    model = str(mapping(run.config.get("model")).get("_target_"))
    objective = str(mapping(run.config.get("objective")).get("_target_"))
    return "Reconstruction" in objective or model.startswith("genscale.upscaling.")


def progress(run: RunContents) -> Markup:
    """Show the first, the middle and the last sample grid of the training."""
    grids = list(run.step_grids.items())
    if not grids:
        return section("During training", missing("No sample grids were written."))
    chosen = sorted({0, (len(grids) - 1) // 2, len(grids) - 1})
    shown = [
        picture(path, f"step {step:,}", alt=f"samples at step {step:,}")
        for step, path in (grids[index] for index in chosen)
    ]
    same = "pictures" if _reconstructs(run) else "noise and labels"
    note = element("p", f"The same {same} at every step.", class_="note")
    return section("During training", element("div", *shown, class_="row"), note)


def sample_sets(run: RunContents) -> Markup:
    """Show the newest sample sets."""
    if not run.sample_sets:
        return Markup("")
    shown = []
    for sample_set in run.sample_sets[-_MAX_SAMPLE_SETS:]:
        record = sample_set.record
        made = [
            f"{number(record['num_samples'])} samples" if "num_samples" in record else "-",
            describe(record.get("sampler")),
            describe(record.get("guidance")),
        ]
        caption = ", ".join([f"samples/{sample_set.name}", *(w for w in made if w != "-")])
        shown.append(picture(sample_set.grid, caption, alt="generated samples"))
    left_out = len(run.sample_sets) - len(shown)
    note = f"The newest of {len(run.sample_sets)} sets." if left_out else ""
    parts: list[str] = [element("div", *shown, class_="row")]
    return section("Sample sets", *parts, *([element("p", note, class_="note")] if note else []))


def protocols(run: RunContents) -> Markup:
    """List the fields of the protocols behind the numbers."""
    listed = protocol_list(run.evaluations)
    return section("Protocols", listed) if listed else Markup("")


def config(run: RunContents) -> Markup:
    """Show the resolved config, folded."""
    if run.config_text is None:
        return section("Config", missing("There is no config.yaml."))
    summary = element("summary", "config.yaml, as the run resolved it")
    return section("Config", element("details", summary, element("pre", run.config_text)))


def environment(run: RunContents) -> Markup:
    """Show versions, device and revision."""
    if not run.environment:
        return section("Environment", missing("There is no env.json."))
    facts = {
        key: run.environment[key]
        for key in ("device", "threads", "platform", "python", "git")
        if run.environment.get(key) is not None
    }
    facts |= mapping(run.environment.get("versions"))
    rows = [
        element("tr", element("th", str(name), scope="row"), element("td", number(value)))
        for name, value in facts.items()
    ]
    return section("Environment", element("table", *rows, class_="facts"))


def commands(run: RunContents) -> Markup:
    """Give the commands that repeat what is shown."""
    shown_run = shlex.quote(f"run={run.shown_path}")
    parts: list[str] = []
    typed = _typed(run.environment.get("command"))
    if typed:
        parts += ["Train:", element("pre", typed)]
    for evaluation in run.evaluations:
        line = _typed(evaluation.record.get("command"))
        if not line:
            words = [f"run={run.shown_path}", *_evaluation_words(run, evaluation)]
            line = f"python evaluate.py {shlex.join(words)}"
        parts += [f"Evaluate, as in {evaluation.name}:", element("pre", line)]
    parts += ["Sample:", element("pre", f"python sample.py {shown_run} num_samples=64")]
    return section("Commands", *parts)


def _typed(command: Any) -> str:
    """Write a recorded ``sys.argv`` as one would type it; empty where none was recorded."""
    if not isinstance(command, list) or not command:
        return ""
    words = [str(word) for word in command]
    program = words[0].rpartition("/")[2]
    start = ["python", program] if program.endswith(".py") else [program]
    return shlex.join([*start, *words[1:]])


def _evaluation_words(run: RunContents, evaluation: Evaluation) -> list[str]:
    """Return the settings of an evaluation as overrides; a changed class is given by its path."""
    record = evaluation.record
    names = ("checkpoint", "weights", "num_samples", "seed")
    words = [f"{name}={record[name]}" for name in names if record.get(name) is not None]
    for group, keys in (("sampler", ("steps",)), ("guidance", ("scale", "interval"))):
        used, own = mapping(record.get(group)), mapping(run.config.get(group))
        target = str(used.get("_target_") or "")
        if target.endswith(".Unguided"):
            words.append("guidance=none")
        elif own and target and target != own.get("_target_"):
            words.append(f"{group}._target_={target}")
        for key in keys:
            if used.get(key) is not None:
                words.append(f"{group}.{key}={str(used[key]).replace(' ', '')}")
    return words


def problems(run: RunContents) -> Markup:
    """List files that could not be read."""
    if not run.problems:
        return Markup("")
    items = [element("li", sentence) for sentence in run.problems]
    return section("Left out", element("ul", *items))


def body(run: RunContents) -> Markup:
    """Return everything between the body tags."""
    parts = (
        *(headline, newest_samples, metrics, curves, progress, sample_sets),
        *(protocols, commands, config, environment, problems),
    )
    return element("main", *(part(run) for part in parts))
