"""The report: everything of a run folder on one page, and nothing believed that lies in it."""

from __future__ import annotations

import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from genscale.report import write_report

VOID = {"meta", "img"}
EVIL = "<script>alert('x')</script>\"'&"


class Page(HTMLParser):
    """Checks nesting while reading; collects tags, attributes and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def png(path: Path, width: int = 4, height: int = 3) -> None:
    """Write a grey picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\x00" + bytes([128] * width) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def evaluation(run: Path, name: str, protocol: str, fields: dict, value: float = 5.25) -> None:
    metric = {
        "name": "fd_probe",
        "value": value,
        "protocol": protocol,
        "details": {"floor": 1.5, "seconds": 9.75},
    }
    record = {
        "run": "outputs/x",
        "checkpoint": "latest",
        "weights": "ema",
        "num_samples": 500,
        "seed": 3,
        "sampler": {"_target_": "genscale.samplers.ode.Heun", "steps": 30},
        "guidance": {"_target_": "genscale.guidance.cfg.ClassifierFree", "scale": 2.0},
        "nfe_per_sample": 60.0,
        "seconds": 75,
        "metrics": [metric],
        "protocols": {protocol: fields},
    }
    folder = run / "evaluations" / name
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(record))


FIELDS = {"features": "probe", "num_samples": 500, "guidance_scale": 1.0, "reference": "digits"}


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "outputs" / "dimr_digits" / "2026-01-02_03-04-05"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "name: dimr_digits\npaths:\n  outputs: outputs\nmodel:\n  depths: [2, 3]\n"
    )
    environment = {
        "versions": {"torch": "2.13.0"},
        "git": "abc123",
        "device": "cpu",
        "python": "3.11.7",
        "command": ["/somewhere/train.py", "model=dimr", "labels=[3, 7]"],
    }
    (folder / "env.json").write_text(json.dumps(environment))
    summary = {"steps": 300, "samples_seen": 19_200, "seconds": 3700, "parameters": 1_234_567}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [
        {
            "step": step,
            "samples_seen": 64 * step,
            "train/loss": 10.0 / step,
            "train/loss_level_0": 20.0 / step,
            "train/learning_rate": 1e-3,
            "train/gradient_norm": 1.0,
            "train/samples_per_second": 700.0,
        }
        for step in range(10, 301, 10)
    ]
    rows.append({"step": 300, "eval/fd_probe": 6.5})
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 310, "trai')
    for step in (100, 150, 200, 250, 300):
        png(folder / "samples" / f"step-{step:08d}.png")
    evaluation(folder, "1-unguided", "aaaa1111", FIELDS)
    evaluation(folder, "2-guided", "bbbb2222", FIELDS | {"guidance_scale": 2.0}, value=8.5)
    png(folder / "evaluations" / "2-guided" / "grid.png", width=40)
    return folder


def test_the_page_stands_alone(run):
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    assert page.of("script") == page.of("link") == page.of("iframe") == []
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.of("img"))
    assert all(link["href"].startswith("#") for link in page.of("a"))
    assert not re.search(r"url\(|@import|https?://", page.source)


def test_the_same_folder_gives_the_same_bytes_and_no_other_file(run):
    first = write_report(run).read_bytes()
    before = sorted(run.rglob("*"))
    assert write_report(run).read_bytes() == first
    assert sorted(run.rglob("*")) == before


def test_headline(run):
    text = Page(write_report(run)).text
    assert "dimr_digits outputs/dimr_digits/2026-01-02_03-04-05 | cpu" in text
    for fact in (
        "300 optimizer steps",
        "19.2 k samples seen",
        "1.23 M parameters",
        "1 h 1 min training time",
        "0.0333 last loss",
        "8.500 fd_probe, newest evaluation",
    ):
        assert fact in text


def test_evaluations_stand_side_by_side_with_their_protocols(run):
    page = Page(write_report(run))
    assert "metric 1-unguided 2-guided" in page.text
    # value, hash, then details without the time they took
    assert "5.250 aaaa1111 floor 1.500 8.500 bbbb2222 floor 1.500" in page.text
    assert "guidance ClassifierFree scale=2 ClassifierFree scale=2" in page.text
    assert "not comparable" not in page.text
    anchors = {attributes.get("id") for _, attributes in page.tags}
    links = [link["href"] for link in page.of("a")]
    assert links == ["#protocol-aaaa1111", "#protocol-bbbb2222"]
    assert {link[1:] for link in links} <= anchors
    assert "bbbb2222 fd_probe of 2-guided" in page.text


def test_numbers_measured_differently_are_kept_apart(run):
    evaluation(run, "3-few", "cccc3333", FIELDS | {"num_samples": 100})
    page = Page(write_report(run))
    assert len([t for t in page.of("table") if t.get("class") == "metrics"]) == 2
    assert (
        "its numbers are not comparable with those above: num_samples 500 there, 100 here."
        in page.text
    )


def test_numbers_whose_protocols_were_lost_are_kept_apart(run):
    evaluation(run, "3-lost", "dddd4444", FIELDS)
    path = run / "evaluations" / "3-lost" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"protocols": {}}))
    text = Page(write_report(run)).text
    assert "protocols aaaa1111 and dddd4444, whose fields were not kept" in text


def test_curves(run):
    page = Page(write_report(run))
    titles = [svg["aria-label"] for svg in page.of("svg")]
    assert titles == [
        f"{name} over optimizer steps"
        for name in ("loss", "learning rate", "gradient norm", "samples per second", "fd_probe")
    ]
    assert "loss_level_0" in page.text  # beside the whole loss, in one chart
    points = page.of("polyline")[-1]["points"]
    assert len(points.split()) == 1  # the single evaluation during training
    assert "fd_probe: 6.500 at 300 optimizer steps" in page.text


def test_a_torn_line_is_counted(run):
    text = Page(write_report(run)).text
    assert "1 torn line of metrics.jsonl left out." in text


def test_values_that_are_not_finite_are_counted_and_not_drawn(run):
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": 1.0}\n{"step": 2, "train/loss": null}\n'
        '{"step": 3, "train/loss": NaN}\n{"step": 4, "train/loss": 2.0}\n'
    )
    page = Page(write_report(run))
    assert "Rows with a value that is not finite, which is not drawn: 2." in page.text
    assert all("nan" not in line["points"] for line in page.of("polyline"))
    assert len(page.of("polyline")[-1]["points"].split()) == 2


def test_first_middle_and_last_grid_of_the_training(run):
    text = Page(write_report(run)).text
    assert [
        s
        for s in (100, 150, 200, 250, 300)
        if f"step {s}" in text.split("Protocols")[0].split("During training")[1]
    ] == [100, 200, 300]


def test_the_newest_evaluation_gives_the_samples(run):
    page = Page(write_report(run))
    assert "evaluations/2-guided: 500 samples evaluated, Heun steps=30" in page.text
    assert page.of("img")[0]["width"] == "40"


def test_wide_grids_are_shrunk(run):
    png(run / "evaluations" / "2-guided" / "grid.png", width=2800, height=100)
    page = Page(write_report(run))
    # 1400 is MAX_WIDTH; the height follows
    assert (page.of("img")[0]["width"], page.of("img")[0]["height"]) == ("1400", "50")
    assert "shrunk from 2800 pixels width" in page.text


def test_commands_to_repeat(run):
    text = Page(write_report(run)).text
    assert "python train.py model=dimr 'labels=[3, 7]'" in text
    assert (
        "python evaluate.py run=outputs/dimr_digits/2026-01-02_03-04-05 checkpoint=latest "
        "weights=ema num_samples=500 seed=3 sampler.steps=30 guidance.scale=2.0" in text
    )
    assert "/somewhere" not in text


def test_an_evaluation_that_recorded_its_command_shows_it(run):
    path = run / "evaluations" / "2-guided" / "metrics.json"
    command = ["/somewhere/bin/genscale-evaluate", "run=a", "sampler=heun"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"command": command}))
    assert "genscale-evaluate run=a sampler=heun" in Page(write_report(run)).text


def test_an_evaluation_with_another_sampler_names_its_class(run):
    with (run / "config.yaml").open("a") as file:
        file.write("sampler:\n  _target_: genscale.samplers.ode.Euler\n")
    text = Page(write_report(run)).text
    assert "sampler._target_=genscale.samplers.ode.Heun sampler.steps=30" in text


def test_an_empty_folder_gives_a_page_of_plain_sentences(tmp_path):
    text = Page(write_report(tmp_path)).text
    for sentence in (
        "no summary.json: still running, or stopped before its end",
        "There are no samples yet. Make some with: python sample.py run=",
        "There is no evaluation yet. Make one with: python evaluate.py run=",
        "Nothing was logged in metrics.jsonl.",
        "No sample grids were written.",
        "There is no config.yaml.",
        "There is no env.json.",
    ):
        assert sentence in text


@pytest.mark.parametrize(
    "part",
    ["config.yaml", "env.json", "summary.json", "metrics.jsonl", "samples", "evaluations"],
)
def test_every_part_may_be_missing(run, part):
    path = run / part
    if path.is_dir():
        path.rename(run.parent / "elsewhere")
    else:
        path.unlink()
    Page(write_report(run))


def test_damaged_files_are_named(run):
    (run / "config.yaml").write_text("a: [1")
    (run / "env.json").write_text("[]")
    (run / "summary.json").write_text("{")
    (run / "evaluations" / "1-unguided" / "metrics.json").write_text("")
    (run / "samples" / "step-00000100.png").write_bytes(b"\x89PNG")
    text = Page(write_report(run)).text
    for sentence in (
        "config.yaml could not be read: while parsing",
        "env.json holds no mapping.",
        "summary.json could not be read:",
        "1-unguided/metrics.json could not be read:",
        "step-00000100.png is no complete PNG file.",
    ):
        assert sentence in text


def test_records_of_unexpected_shape_do_no_harm(run):
    (run / "env.json").write_text(json.dumps({"versions": 3, "command": "x", "device": ["a"]}))
    (run / "summary.json").write_text(json.dumps({"seconds": "long", "steps": None}))
    (run / "metrics.jsonl").write_text('[1]\n{"step": "x", "train/loss": 1}\n{"train/loss": "y"}\n')
    record = {
        "metrics": [3, {"name": 1, "value": None}, {"value": 2}],
        "protocols": [],
        "seconds": [],
    }
    (run / "evaluations" / "1-unguided" / "metrics.json").write_text(json.dumps(record))
    Page(write_report(run))


def test_hostile_text_is_shown_as_text(run):
    (run / "config.yaml").write_text(f"name: |-\n  {EVIL}\n")
    environment = {"device": EVIL, "versions": {EVIL: EVIL}, "command": ["train.py", EVIL]}
    (run / "env.json").write_text(json.dumps(environment))
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 1, f"train/{EVIL}": 1.0, f"eval/{EVIL}": 2.0})
    )
    evaluation(run, "9 <b>bold", f'"{EVIL}', {EVIL: EVIL})
    page = Page(write_report(run))
    assert page.of("script") == []
    assert page.of("b") != []
    assert "<script" not in page.source
    assert "<b>bold" not in page.source
    assert EVIL in page.text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_a_killed_writer_leaves_the_old_report(run, monkeypatch):
    path = write_report(run)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_report(run)
    assert path.read_bytes() == before
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no run folder at .*nowhere"):
        write_report(tmp_path / "nowhere")
