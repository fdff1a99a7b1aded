"""Every golden case gives the numbers of the program it came from.

The cases below ``data/`` always run. Where ``GENSCALE_GOLDEN`` names another folder laid out alike,
all of its cases run too; there, a system that has no adapter is skipped by name.
"""

import os
from pathlib import Path

import pytest

from scripts.parity import Case, find_cases, run_case

VENDORED = Path(__file__).parent / "data"
EXTERNAL = os.environ.get("GENSCALE_GOLDEN")


def _parameters(root: Path) -> list:
    return [pytest.param(case, id=f"{case.system}-{case.name}") for case in find_cases(root)]


def _check(case: Case) -> None:
    comparisons = run_case(case)
    assert comparisons is not None, f"no adapter for {case.system}"
    assert comparisons, "the adapter compared nothing"
    failed = [
        f"{c.name}: off by {c.absolute:.3g} (atol {c.atol:g}, rtol {c.rtol:g})"
        for c in comparisons
        if not c.passed
    ]
    assert not failed, "; ".join(failed)


@pytest.mark.parametrize("case", _parameters(VENDORED))
def test_vendored_case(case: Case) -> None:
    _check(case)


if EXTERNAL:

    @pytest.mark.slow
    @pytest.mark.parametrize("case", _parameters(Path(EXTERNAL)))
    def test_external_case(case: Case) -> None:
        if not (Path(__file__).parents[2] / "scripts" / "parity" / f"{case.system}.py").is_file():
            pytest.skip(f"scripts/parity has no adapter for the system '{case.system}'")
        if run_case(case) is None:
            pytest.skip(f"scripts/parity does not know the case '{case.name}' of {case.system}")
        _check(case)


def test_the_runner_fails_a_wrong_number() -> None:
    """A comparison outside its tolerance, or of another shape, does not pass."""
    case = next(find_cases(VENDORED, ["metrics"]))
    expected = next(iter(case.group("output").values()))
    assert case.compare("same", expected.clone(), expected).passed
    assert not case.compare("shifted", expected + 1.0, expected).passed
    assert not case.compare("reshaped", expected[None], expected).passed
