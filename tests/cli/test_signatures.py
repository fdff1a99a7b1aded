"""Signatures read from source text agree with those of the imported objects."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from genscale.cli.signatures import read_signature

MODULE = """
from dataclasses import dataclass, field
from typing import ClassVar, overload

try:
    from .inner import Deep as Renamed
except ImportError:
    raise

class Plain:
    def __init__(self, first, /, a, b=2, *, c, d=(1, 2)):
        pass
    @classmethod
    def make(cls, x, y=1): ...

class Open:
    def __init__(self, a=1, **rest): ...

class Heir(Plain): ...

@dataclass(frozen=True)
class Record:
    a: int
    b: float = 0.5
    KIND: ClassVar[str] = "x"
    c: list = field(init=False)

@dataclass
class Longer(Record):
    d: int = 3

def function(a, *, b=1): ...

if True:
    def guarded(z): ...

constant = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "signature_package"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('read, never run')\n")
    (folder / "module.py").write_text(MODULE)
    (folder / "inner" / "__init__.py").write_text("from ..deep import Deep\n")
    (folder / "deep.py").write_text("class Deep:\n    def __init__(self, q=1): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Plain", {"a": None, "b": "2", "c": None, "d": "(1, 2)"}),
        ("Plain.make", {"x": None, "y": "1"}),
        ("Open", {"a": "1"}),
        ("Heir", {"a": None, "b": "2", "c": None, "d": "(1, 2)"}),
        ("Record", {"a": None, "b": "0.5"}),
        ("Longer", {"a": None, "b": "0.5", "d": "3"}),
        ("function", {"a": None, "b": "1"}),
        ("guarded", {"z": None}),
        ("Renamed", {"q": "1"}),
    ],
)
def test_source_is_read_and_never_run(package, name, parameters):
    signature = read_signature(f"signature_package.module.{name}")
    assert signature.parameters == parameters
    assert signature.accepts_any == (name == "Open")
    assert ("anything" in signature) == (name == "Open")


def test_it_is_written_as_a_call(package):
    shown = str(read_signature("signature_package.module.Plain"))
    assert shown == "signature_package.module.Plain(a, b=2, c, d=(1, 2))"


@pytest.mark.parametrize(
    "target",
    [
        "signature_package.module.constant",
        "signature_package.module.Nope",
        "math.sqrt",
        "no_such_package.Net",
        "Net",
    ],
)
def test_what_has_no_source_has_no_signature(package, target):
    assert read_signature(target) is None


@pytest.mark.parametrize(
    "target",
    [
        "genscale.training.optim.AdamW",
        "genscale.training.lr_schedule.WarmupStableDecay",
        "genscale.training.ema.ConstantEMA",
    ],
)
def test_it_agrees_with_the_imported_object(target):
    from hydra.utils import get_object

    real = inspect.signature(get_object(target)).parameters
    assert list(read_signature(target).parameters) == list(real)


def test_reading_a_signature_imports_nothing():
    code = (
        "import sys; from genscale.cli.signatures import read_signature; "
        "assert 'max_steps' in read_signature('lightning.pytorch.Trainer'); "
        "sys.exit('lightning' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
