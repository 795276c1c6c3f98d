"""Comparison of methods on the same tasks, seeds and classifier: JSON lines, table, HTML page."""

from erasediff.comparison.harness import Task, compare
from erasediff.comparison.results_file import ResultsFile
from erasediff.comparison.run_case import Case, Cost

__all__ = ["Case", "Cost", "ResultsFile", "Task", "compare"]
