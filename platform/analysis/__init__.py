"""Statistics, tables and figures, read from the ledger alone."""

from .comparison import Comparison, compare
from .render import FORMATS, render, show
from .results import Results, results

__all__ = ["FORMATS", "Comparison", "Results", "compare", "render", "results", "show"]
