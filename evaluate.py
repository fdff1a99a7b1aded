"""Evaluate a trained run: python evaluate.py run=outputs/latest (--help for everything else)."""

from __future__ import annotations

import sys

from genscale.cli.entry import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
