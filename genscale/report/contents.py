"""What lies in a run folder, read without trusting it: parts may be missing, torn or hostile."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STEP_GRID = re.compile(r"step-(\d+)\.png$")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One folder of ``evaluations/``.

    Args:
        name: of the folder.
        record: ``metrics.json``.
        grid: its samples, where they were kept.
    """

    name: str
    record: dict[str, Any]
    grid: Path | None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The numbers: ``name``, ``value``, ``protocol``, ``details``."""
        found = self.record.get("metrics")
        rows = found if isinstance(found, list) else []
        return [row for row in rows if isinstance(row, dict) and "name" in row]

    @property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """Fields of the protocols by hash."""
        found = mapping(self.record.get("protocols"))
        return {str(key): value for key, value in found.items() if isinstance(value, dict)}


@dataclass(frozen=True, slots=True)
class SampleSet:
    """One folder of ``samples/`` with a grid."""

    name: str
    record: dict[str, Any]
    grid: Path


@dataclass(slots=True)
class RunContents:
    """Everything a report shows.

    Args:
        path: the run folder.
        config_text: ``config.yaml`` as written, or None.
        config: the same, parsed; empty where it cannot be.
        environment: ``env.json``.
        summary: ``summary.json``.
        rows: lines of ``metrics.jsonl``, in the order of their steps.
        torn_lines: lines that are no JSON object, as a kill leaves them.
        step_grids: sample grids of the training by step.
        sample_sets: what ``sample.py`` left, oldest first.
        evaluations: what ``evaluate.py`` left, oldest first.
        problems: one sentence for every file that could not be read.
    """

    path: Path
    config_text: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    torn_lines: int = 0
    step_grids: dict[int, Path] = field(default_factory=dict)
    sample_sets: list[SampleSet] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name, or that of its folder."""
        return str(self.config.get("name") or self.path.name)

    @property
    def shown_path(self) -> str:
        """The folder as one would type it: where the config says that runs are written."""
        if self.config.get("run_dir"):
            return str(self.config["run_dir"])
        outputs = mapping(self.config.get("paths")).get("outputs")
        if outputs and self.path.parent.name == self.name:
            return f"{outputs}/{self.name}/{self.path.name}"
        return self.path.name

    def series(self, name: str) -> list[tuple[float, float]]:
        """Return (step, value) of one logged quantity; rows without a finite value are left out."""
        points = []
        for row in self.rows:
            step, value = row.get("step"), row.get(name)
            if _is_finite(step) and _is_finite(value):
                points.append((float(row["step"]), float(row[name])))
        return points

    def series_names(self, prefix: str) -> list[str]:
        """Return the logged quantities whose names begin with ``prefix``, in order of arrival."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name.startswith(prefix)]

    def non_finite_rows(self) -> int:
        """Return how many rows hold a quantity without a finite value (null in the file)."""
        return sum(any("/" in k and not _is_finite(v) for k, v in r.items()) for r in self.rows)


def mapping(value: Any) -> dict[str, Any]:
    """Return ``value`` if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def read_run(path: Path) -> RunContents:
    """Read a run folder; whatever is missing or damaged is left out and told in ``problems``."""
    run = RunContents(path=path)
    run.config_text, run.config = _read_config(path / "config.yaml", run.problems)
    run.environment = _read_json(path / "env.json", run.problems)
    run.summary = _read_json(path / "summary.json", run.problems)
    run.rows, run.torn_lines = _read_rows(path / "metrics.jsonl", run.problems)
    for grid in sorted((path / "samples").glob("step-*.png")):
        match = _STEP_GRID.search(grid.name)
        if match:
            run.step_grids[int(match.group(1))] = grid
    run.step_grids = dict(sorted(run.step_grids.items()))
    for folder in _folders(path / "samples"):
        if (folder / "grid.png").is_file():
            record = _read_json(folder / "samples.json", run.problems)
            run.sample_sets.append(SampleSet(folder.name, record, folder / "grid.png"))
    for folder in _folders(path / "evaluations"):
        if (folder / "metrics.json").is_file():
            record = _read_json(folder / "metrics.json", run.problems)
            grid = folder / "grid.png"
            if record:
                known = grid if grid.is_file() else None
                run.evaluations.append(Evaluation(folder.name, record, known))
    return run


def _folders(path: Path) -> list[Path]:
    """Return sub-folders by name: stamps sort by time."""
    return sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []


def _read_text(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error.strerror}.")
        return None


def _parsed(
    path: Path, parse: Callable[[str], Any], problems: list[str]
) -> tuple[str | None, dict[str, Any]]:
    """Read a file that holds one mapping."""
    text = _read_text(path, problems)
    if text is None:
        return None, {}
    try:
        content = parse(text)
    except Exception as error:  # whatever a parser makes of a damaged file
        reason = " ".join(str(error).split())
        problems.append(f"{path.parent.name}/{path.name} could not be read: {reason}.")
        return text, {}
    if not isinstance(content, dict):
        problems.append(f"{path.parent.name}/{path.name} holds no mapping.")
        return text, {}
    return text, content


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    return _parsed(path, json.loads, problems)[1]


def _read_config(path: Path, problems: list[str]) -> tuple[str | None, dict[str, Any]]:
    import yaml

    return _parsed(path, yaml.safe_load, problems)


def _read_rows(path: Path, problems: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Read one JSON object a line; others are counted."""
    rows, torn = [], 0
    for line in (_read_text(path, problems) or "").splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn += 1
    rows.sort(key=lambda row: float(row["step"]) if _is_finite(row.get("step")) else -1.0)
    return rows, torn


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
