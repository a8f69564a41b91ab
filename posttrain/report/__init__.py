"""`posttrain report`: one self-contained HTML page about one or more runs."""

from posttrain.report.page import build

__all__ = ["build"]
