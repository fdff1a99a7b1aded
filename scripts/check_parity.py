"""Compare genscale with the official programs on a folder of golden cases.

python scripts/check_parity.py ROOT [--system NAME ...] [--strict]

Prints one line a case: system, case, largest absolute and relative error, tolerance, verdict.
Exits with 1 on any FAIL; with --strict a case without adapter (SKIP) fails too.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="folder laid out as <system>/<case>.json")
    parser.add_argument("--system", action="extend", nargs="+", help="only these systems")
    parser.add_argument("--strict", action="store_true", help="a case without adapter fails")
    arguments = parser.parse_args()
    if not arguments.root.is_dir():
        print(f"No golden folder at {arguments.root}. Give a folder laid out as system/case.json.")
        return 2

    from scripts.parity import find_cases, run_case

    counts = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    print(f"{'system':<16}{'case':<34}{'abs':>10}{'rel':>10}{'atol':>10}{'rtol':>10}  verdict")
    for case in find_cases(arguments.root, arguments.system):
        atol, rtol = case.tolerance() if isinstance(case.info.get("tolerance"), dict) else (0, 0)
        absolute, relative, note = float("nan"), float("nan"), ""
        try:
            comparisons = run_case(case)
        except Exception as error:
            traceback.print_exc()
            verdict, note = "FAIL", f"{type(error).__name__}: {error}"
        else:
            if comparisons is None:
                verdict = "SKIP"
            elif not comparisons:
                verdict, note = "FAIL", "the adapter compared nothing"
            else:
                # the tolerance printed is that of the output furthest from its reference
                worst = max(comparisons, key=lambda c: c.absolute)
                absolute = worst.absolute
                relative = max(c.relative for c in comparisons)
                atol, rtol = worst.atol, worst.rtol
                failed = [c.name for c in comparisons if not c.passed]
                verdict = "FAIL" if failed else "PASS"
                note = f"({len(comparisons)} outputs)" + (f" failed: {failed}" if failed else "")
        counts[verdict] += 1
        print(
            f"{case.system:<16}{case.name:<34}{absolute:>10.2e}{relative:>10.2e}"
            f"{atol:>10.1e}{rtol:>10.1e}  {verdict} {note}",
            flush=True,
        )
    print(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    if sum(counts.values()) == 0:
        print("No case was found. Check the folder and the system names.")
        return 1
    return 1 if counts["FAIL"] or (arguments.strict and counts["SKIP"]) else 0


if __name__ == "__main__":
    sys.exit(main())
