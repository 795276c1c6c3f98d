"""Comparison harness: run every method on every task and seed, and take the measurements of the task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from erasediff.comparison.results_file import ResultsFile
from erasediff.comparison.run_case import Case, FailedRun, run_case
from erasediff.errors import UserError

Measurement = Callable[[Path, Case, Path | None], Mapping[str, Any]]
"""Function of the model's path, the case and the path of the retrained model, if any, that returns numbers by name."""

BASE, ORACLE = "base", "retrain"
"""References for the other methods; measured first."""


class Task(Protocol):
    """Unlearning task of a comparison: a base model, data to forget, and measurements."""

    @property
    def name(self) -> str:
        """Name such as "digits/3"; each group before the slash has a table of its own."""
        ...

    def base(self, seed: int, console: Console) -> Path:
        """Path of the model to unlearn from, which is trained unless it exists."""
        ...

    def settings(self, method: str) -> Mapping[str, Any]:
        """Dotted settings of ``method`` on this task. UserError for a method without any."""
        ...

    def measurements(self, method: str) -> Mapping[str, Measurement]:
        """Measurements by name, in the order to take them; the table begins with "quality"."""
        ...


def compare(
    tasks: Sequence[Task],
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    lines: ResultsFile,
    runs: Path,
    console: Console,
) -> None:
    """Run all methods on all tasks and seeds, and take every measurement that has no line yet.

    Args:
        tasks: Tasks to unlearn.
        methods: Names of methods, "base" and "retrain" included.
        seeds: Seeds of runs and samples.
        lines: Results file to append to.
        runs: Folder of the unlearned models.
        console: Console for progress and notes.

    Raises:
        UserError: A task has no settings for a method, before anything is run; or runs failed, after all others.
    """
    first = [name for name in (BASE, ORACLE) if name in methods]
    cases = [
        (task, _case(task, method, seed))
        for seed in seeds
        for task in tasks
        for method in dict.fromkeys([*first, *methods])
    ]
    failures = []
    for number, (task, case) in enumerate(cases, start=1):
        missing = {
            name: measurement
            for name, measurement in task.measurements(case.method or BASE).items()
            if not lines.has(case.identity() | {"measurement": name})
        }
        if not missing:
            continue
        title = f"{number} of {len(cases)}: {case.task}, {case.method or BASE}, seed {case.seed}"
        base = task.base(case.seed, console)
        with console.status(title):
            try:
                oracle = run_case(_case(task, ORACLE, case.seed), base, runs)[0] if ORACLE in methods else None
                model, cost = run_case(case, base, runs)
            except FailedRun as failure:
                failures.append(failure)
                console.print(f"{title}: {failure}", soft_wrap=True)
                continue
            for name, measurement in missing.items():
                line = {
                    **case.identity(),
                    "measurement": name,
                    "values": measurement(model, case, oracle),
                    "chosen": case.described(),
                    "cost": None if cost is None else asdict(cost),
                }
                lines.append(line)
        console.print(f"{title}: {', '.join(missing)}")
    if failures:
        raise UserError(f"{len(failures)} of {len(cases)} cases failed; the first: {failures[0]}")


def _case(task: Task, method: str, seed: int) -> Case:
    if method == BASE:
        return Case(task=task.name, method=None, seed=seed, settings={})
    return Case(task=task.name, method=method, seed=seed, settings=task.settings(method))
