"""Text in pictures against the text that captions quote."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from genscale.rewards.base import Request
from genscale.rewards.ocr import OCR, Reading, edit_distance, plain_text, quoted_texts

REQUESTS = [Request('a sign that says "Open 24"'), Request("'Don't' and \u201cwalk\u201d")]


class Reader(OCR):
    """Reads from the brightness of the first pixel which of these texts a picture shows."""

    texts = ((), ("OPEN", "24"), ("0PEN",), ("we are open 24 hours",), ("DON'T WALK",))

    def read(self, picture: np.ndarray) -> Reading:
        lines = self.texts[round(int(picture[0, 0, 0]) / 51)]
        return Reading(lines, 0.9 if lines else 0.0)


def shown(*numbers: int) -> torch.Tensor:
    """Return pictures that show the texts of these numbers."""
    return (torch.tensor(numbers) / 5)[:, None, None, None].expand(-1, 3, 4, 4)


@pytest.mark.parametrize(
    ("caption", "texts"),
    [
        ('a sign that says "Open 24" and "here"', ["Open 24", "here"]),
        ("the word 'Don't' in the king's garden", ["Don't"]),
        ("\u201cone\u201d, \u00abtwo\u00bb, \u2018three\u2019", ["one", "two", "three"]),
        ("the kings' garden isn't quoted", []),
        ("", []),
    ],
)
def test_quotes(caption: str, texts: list[str]) -> None:
    assert quoted_texts(caption) == texts


def test_edits() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("open", "") == 4
    assert edit_distance("open", "weareopennow", inside=True) == 0
    assert edit_distance("open", "weareqpennow", inside=True) == 1
    assert edit_distance("open", "", inside=True) == 4
    assert edit_distance("", "open") == 4
    assert plain_text("  \uff2fpen\n24 ") == "open24"  # wide letters are letters


def test_the_share_of_characters_that_can_be_read() -> None:
    reward = Reader()
    handle = reward.prepare(REQUESTS)
    assert handle == [("open24",), ("don't", "walk")]
    found = reward.score(shown(0, 1, 2, 3, 4, 1), handle, torch.tensor([0, 0, 0, 0, 1, 1]))
    assert found.value.dtype == torch.float32
    # of the last, 9 characters: "don't" is 4 edits from any stretch of "open24", "walk" 4
    assert found.value.tolist() == pytest.approx([0.0, 1.0, 0.5, 1.0, 1.0, 1 / 9])
    assert found.parts["confidence"].tolist() == pytest.approx([0.0, *[0.9] * 5])
    assert found.valid is not None
    assert found.valid.all()
    for i, request in enumerate((0, 0, 0, 0, 1, 1)):  # alone as among others
        alone = reward.score(shown(0, 1, 2, 3, 4, 1)[i : i + 1], handle, torch.tensor([request]))
        assert alone.value[0] == found.value[i]


def test_further_text_costs_where_the_whole_counts() -> None:
    reward = Reader(whole=True)
    found = reward.score(shown(1, 3), reward.prepare(REQUESTS), torch.tensor([0, 0]))
    assert found.value.tolist() == pytest.approx([1.0, 6 / 16])  # "weareopen24hours"
    assert (reward.label, Reader().label) == ("OCR(whole, confidence 0.5)", "OCR(confidence 0.5)")


def test_captions_without_quotes_are_told_of() -> None:
    reward = OCR()
    assert reward.problems(REQUESTS) == []
    (problem,) = reward.problems([*REQUESTS, Request("a red circle")])
    assert "1 of 3 quote none (first: 'a red circle')" in problem
    (problem,) = reward.problems([Request(label=1)])
    assert "judges by the caption" in problem
    found = Reader().score(shown(1), reward.prepare([Request("a red circle")]), torch.tensor([0]))
    assert found.valid is not None
    assert not found.valid.any()
    assert not reward.differentiable


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rapidocr", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    problems = OCR().check()
    assert len(problems) == 2
    assert "needs the package 'rapidocr'" in problems[0]
    assert 'pip install "genscale[rewards]"' in problems[0]
    with pytest.raises(ImportError, match="needs the package 'onnxruntime'"):
        OCR().read(np.zeros((4, 4, 3), dtype=np.uint8))


def test_the_package_gets_blue_first_and_its_silence_is_no_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[np.ndarray] = []

    @dataclass
    class Output:
        txts: tuple[str, ...] | None
        scores: tuple[float, ...] | None

    class Engine:
        def __init__(self, params: dict[str, object]) -> None:
            assert params["Global.text_score"] == 0.7

        def __call__(self, picture: np.ndarray) -> Output:
            seen.append(picture)
            return Output(("a", "b"), (0.8, 0.9)) if picture.any() else Output(None, None)

    package = ModuleType("rapidocr")
    package.RapidOCR = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rapidocr", package)
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    reward = OCR(min_confidence=0.7)
    assert reward.check() == []
    red = np.zeros((4, 4, 3), dtype=np.uint8)
    assert reward.read(red) == Reading()
    red[..., 0] = 255
    assert reward.read(red) == Reading(("a", "b"), pytest.approx(0.85))
    assert seen[1][0, 0].tolist() == [0, 0, 255]


@pytest.mark.slow
def test_rendered_words_are_read() -> None:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    pictures = []
    for text in ("OPEN 24", "CLOSED"):
        picture = Image.new("RGB", (256, 128), "white")
        ImageDraw.Draw(picture).text((40, 40), text, fill="navy", font=ImageFont.load_default(40))
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    reward = OCR()
    found = reward.score(torch.stack(pictures), reward.prepare(REQUESTS), torch.tensor([0, 0]))
    assert found.value[0] == 1.0
    assert found.value[1] < 0.5
    assert found.parts["confidence"].min() > 0.8
