"""Train a model: python train.py model=dimr data=digits (--help for everything else)."""

from __future__ import annotations

import sys

from genscale.cli.entry import train

if __name__ == "__main__":
    sys.exit(train())
