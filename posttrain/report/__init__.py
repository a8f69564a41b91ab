"""`posttrain report`: one self-contained HTML page about one or more runs."""

from posttrain.report.page import build, figures

__all__ = ["build", "figures"]
