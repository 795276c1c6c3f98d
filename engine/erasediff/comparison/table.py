"""Comparison table: a row per method and a column per number, for each group of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from erasediff.comparison.columns import COLUMNS, Column, Line, Number
from erasediff.comparison.harness import BASE, ORACLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Row of the table: one method's numbers.

    Attributes:
        method: Name of the method.
        outcomes: (forgotten rate, retain accuracy) by (task, seed).
        numbers: Numbers over all runs, by the column's key.
    """

    method: str
    outcomes: Mapping[tuple[str, int], tuple[float, float]]
    numbers: Mapping[str, Number]

    @property
    def tasks(self) -> set[str]:
        return {task for task, _ in self.outcomes}

    @property
    def seeds(self) -> set[int]:
        return {seed for _, seed in self.outcomes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Table of one group of tasks.

    Attributes:
        group: Name of the group.
        rows: Base and retrained model first, then as the lines came.
        curves: Relearning curves by method: share of images in which the class is seen, by step.
    """

    group: str
    rows: Sequence[Row]
    curves: Mapping[str, Mapping[int, float]]

    def columns(self) -> list[Column]:
        """Columns with at least one number."""
        return [column for column in COLUMNS if any(row.numbers[column.key] is not None for row in self.rows)]

    def better_than(self, method: str) -> dict[str, tuple[float, float]]:
        """Methods nowhere worse than ``method`` in forgetting and retention, and somewhere better.

        With the differences of (forgotten rate, retain accuracy), on average over the runs that both have. Base and
        retrained model are no contenders.
        """
        rows = {row.method: row for row in self.rows if row.method not in (BASE, ORACLE)}
        if method not in rows:
            return {}
        margins = {name: _margin(row, rows[method]) for name, row in rows.items()}
        return {
            name: margin
            for name, margin in margins.items()
            if margin is not None and margin[0] <= 0 <= margin[1] and margin != (0, 0)
        }


def tables(lines: Iterable[Line]) -> list[Table]:
    """Make one table per group of tasks. Of a case that was measured with several settings, the last ones count."""
    chosen = _current(list(lines))
    groups = dict.fromkeys(_group(line) for line in chosen)
    return [_table(group, [line for line in chosen if _group(line) == group]) for group in groups]


def gaps(table: Table) -> list[str]:
    """Sentences on missing measurements; they are part of the result."""
    sentences = []
    for count in sorted({len(row.seeds) for row in table.rows if len(row.seeds) < 3}):
        few = [row.method for row in table.rows if len(row.seeds) == count]
        whose = "" if len(few) == len(table.rows) else f" for {', '.join(few)}"
        sentences.append(
            f"Only {count} seed{'s' * (count > 1)} of three{whose}: differences of a percentage point are noise."
        )
    most = {task for row in table.rows for task in row.tasks}
    sentences += [
        f"{row.method} was not run on {', '.join(sorted(most - row.tasks))}." for row in table.rows if most - row.tasks
    ]
    for column in COLUMNS:
        having = [row.method for row in table.rows if row.numbers[column.key] is not None]
        if not having:
            sentences.append(f"Not measured: {column.label}.")
        elif column.measurement != "quality" and (lacking := [r.method for r in table.rows if r.method not in having]):
            sentences.append(f"{column.label}: not measured for {', '.join(lacking)}.")
    return sentences


def markdown(table: Table) -> str:
    """Format the table as Markdown."""
    columns = table.columns()
    heading = ["method", "runs", *(column.label for column in columns)]
    rows = [[row.method, str(len(row.outcomes)), *(cell(column, row) for column in columns)] for row in table.rows]
    aligned = ["---", *["---:"] * (len(heading) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heading, aligned, *rows))


def cell(column: Column, row: Row) -> str:
    number = row.numbers[column.key]
    return "–" if number is None else column.shown(number)


def _table(group: str, lines: list[Line]) -> Table:
    methods = dict.fromkeys(line["method"] for line in lines)
    ordered = [name for name in (BASE, ORACLE) if name in methods]
    rows, curves = [], {}
    for method in dict.fromkeys([*ordered, *methods]):
        method_lines = [line for line in lines if line["method"] == method]
        quality = [line for line in method_lines if line["measurement"] == "quality"]
        if not quality:
            continue
        rows.append(
            Row(
                method=method,
                outcomes={
                    (line["task"], line["seed"]): (line["values"]["forgotten_rate"], line["values"]["retained_mean"])
                    for line in quality
                },
                numbers={column.key: _over_runs(column, method_lines) for column in COLUMNS},
            )
        )
        if curve := _mean_curve(
            [line["values"]["curve"] for line in method_lines if line["measurement"] == "relearning"]
        ):
            curves[method] = curve
    return Table(group=group, rows=rows, curves=curves)


def _current(lines: list[Line]) -> list[Line]:
    """Last line of each measurement with the settings that its case had last."""
    settings, latest = {}, {}
    for line in lines:
        case = line["task"], line["method"], line["seed"]
        if line["measurement"] == "quality":
            settings[case] = line["settings"]
        latest[*case, line["settings"], line["measurement"]] = line
    return [line for key, line in latest.items() if settings.get(key[:3]) == key[3]]


def _group(line: Line) -> str:
    group: str = line["task"].partition("/")[0]
    return group


def _over_runs(column: Column, lines: list[Line]) -> Number:
    values = [column.find(line) for line in lines if line["measurement"] == column.measurement]
    numbers = [number for number in values if number is not None]
    return column.over_runs(numbers) if numbers else None


def _mean_curve(curves: list[list[list[float]]]) -> dict[int, float]:
    """Mean rate at each step that all curves have."""
    if not curves:
        return {}
    by_step = [{int(step): rate for step, rate in curve} for curve in curves]
    shared = [step for step in by_step[0] if all(step in each for each in by_step)]
    return {step: sum(each[step] for each in by_step) / len(by_step) for step in shared}


def _margin(theirs: Row, ours: Row) -> tuple[float, float] | None:
    """Mean differences of forgotten rate and retain accuracy over shared runs; None without shared runs."""
    shared = theirs.outcomes.keys() & ours.outcomes.keys()
    if not shared:
        return None
    forgotten = sum(theirs.outcomes[run][0] - ours.outcomes[run][0] for run in shared)
    retained = sum(theirs.outcomes[run][1] - ours.outcomes[run][1] for run in shared)
    # Means of shares over classes differ in their last bits.
    return round(forgotten / len(shared), 9), round(retained / len(shared), 9)
