"""Sample from a trained run: python sample.py run=outputs/latest (--help for everything else)."""

from __future__ import annotations

import sys

from genscale.cli.entry import sample

if __name__ == "__main__":
    sys.exit(sample())
