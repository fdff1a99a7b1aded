"""One file for the whole story of a run: ``report.html``, with nothing fetched from elsewhere."""

from __future__ import annotations

from pathlib import Path

from genscale.io.files import atomic_write
from genscale.report.contents import read_run
from genscale.report.markup import Markup, element, void
from genscale.report.sections import body

_STYLE = Path(__file__).with_name("style.css")


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder from whatever lies there.

    The page is self-contained: pictures are data URIs, charts are inline SVG, and there is no
    script. Missing or damaged parts are left out with a sentence. The same folder gives the same
    bytes. The file is replaced in one step.

    Args:
        run_dir: the run folder.

    Returns:
        the path of the report.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(
            f"There is no run folder at {run_dir}. Train one with: python train.py model=dimr"
        )
    run = read_run(run_dir)
    report = run_dir / "report.html"
    with atomic_write(report) as temporary:
        temporary.write_text(whole_page(run.name, body(run)), encoding="utf-8")
    return report


def whole_page(title: str, *parts: str) -> str:
    """Return a page that needs nothing beside it."""
    head = element(
        "head",
        void("meta", charset="utf-8"),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name="generator", content="genscale"),
        element("title", f"{title} - genscale"),
        element("style", Markup(_STYLE.read_text(encoding="utf-8"))),
    )
    page = element("html", head, element("body", *parts), lang="en")
    return f"<!doctype html>\n{page}\n"
