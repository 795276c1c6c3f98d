"""Methods side by side: the same task, seeds and judge for each, one JSON line per measurement, a page of them all."""

from erasediff.comparison.harness import Task, compare
from erasediff.comparison.results_file import ResultsFile
from erasediff.comparison.run_case import Case, Cost

__all__ = ["Case", "Cost", "ResultsFile", "Task", "compare"]
