"""Linear recurrences with input-dependent decay: Mamba-1 and Mamba-2 scans, and 2-D orders."""

from genscale.layers.scan.grid import scan_grid
from genscale.layers.scan.orders import SCAN_KINDS, ScanKind, permute_rows, scan_orders
from genscale.layers.scan.selective import selective_scan
from genscale.layers.scan.ssd import ssd

__all__ = [
    "SCAN_KINDS",
    "ScanKind",
    "permute_rows",
    "scan_grid",
    "scan_orders",
    "selective_scan",
    "ssd",
]
