"""Methods side by side: the same task, seeds and judge for each, one JSON line per measurement, a page of them all."""

from erasediff.comparison.case import Case, Cost
from erasediff.comparison.harness import Task, compare
from erasediff.comparison.lines import Lines

__all__ = ["Case", "Cost", "Lines", "Task", "compare"]
