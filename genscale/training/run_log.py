"""metrics.jsonl: what a run logged, one JSON object a line, rewound when a run is resumed."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from genscale.io.files import atomic_write
from genscale.runs import read_jsonl


class RunLog:
    """Appends rows to ``metrics.jsonl`` and mirrors them as ``metrics.csv``.

    Args:
        path: the jsonl file; the csv lies beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; non-finite numbers are written as null, which JSON can hold."""
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(clean) + "\n")

    def rewind(self, step: int) -> None:
        """Drop rows after ``step``: a run killed past its last checkpoint will log them again."""
        if self.path.is_file():
            rows = [row for row in read_jsonl(self.path) if row.get("step", 0) <= step]
            with atomic_write(self.path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write_csv(self) -> None:
        """Write all rows as one table; the columns are the union of the rows' names."""
        rows = read_jsonl(self.path)
        if not rows:
            return
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=names, restval="")
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(self.path.with_suffix(".csv")) as temporary:
            temporary.write_text(text.getvalue())
