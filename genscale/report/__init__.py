"""The report of a run: one HTML file that needs nothing beside it."""

from genscale.report.page import write_report

__all__ = ["write_report"]
