"""From lines to a table: for each group of tasks, a row per method, a column per number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from erasediff.comparison.harness import BASE, ORACLE

Line = Mapping[str, Any]
Number = float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """``note`` explains the number; ``find`` takes it from a line's values or cost, None where it is not there."""

    label: str
    note: str
    measurement: str
    find: Callable[[Line], Number]
    shown: Callable[[float], str]
    over_runs: Callable[[Sequence[float]], float] = lambda numbers: sum(numbers) / len(numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``numbers`` by the column's label, over all runs; ``outcomes`` by (task, seed): (forgotten rate, retained)."""

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
    """One group: base and oracle first, then as the lines came; ``curves`` of relearning, the rate by step."""

    group: str
    rows: Sequence[Row]
    curves: Mapping[str, Mapping[int, float]]

    def columns(self) -> list[Column]:
        """Those of which there is any number."""
        return [column for column in COLUMNS if any(row.numbers[column.label] is not None for row in self.rows)]

    def better_than(self, method: str) -> dict[str, tuple[float, float]]:
        """Methods nowhere worse than ``method`` in forgetting and retention, and somewhere better.

        With what each has more of (forgotten rate, retained), on average over the runs that both have. Base and oracle
        are no contenders.
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
    """A table per group of tasks. Of a case that was measured with several settings, the last ones count."""
    chosen = _current(list(lines))
    groups = dict.fromkeys(_group(line) for line in chosen)
    return [_table(group, [line for line in chosen if _group(line) == group]) for group in groups]


def gaps(table: Table) -> list[str]:
    """What the table does not tell, in sentences; they are part of the result."""
    found = []
    for count in sorted({len(row.seeds) for row in table.rows if len(row.seeds) < 3}):
        few = [row.method for row in table.rows if len(row.seeds) == count]
        whose = "" if len(few) == len(table.rows) else f" for {', '.join(few)}"
        found.append(f"Only {count} seed{'s' * (count > 1)} of three{whose}: differences of a point are noise.")
    most = {task for row in table.rows for task in row.tasks}
    found += [
        f"{row.method} was not run on {', '.join(sorted(most - row.tasks))}." for row in table.rows if most - row.tasks
    ]
    for column in COLUMNS:
        having = [row.method for row in table.rows if row.numbers[column.label] is not None]
        if not having:
            found.append(f"Not measured: {column.label}.")
        elif column.measurement != "quality" and (lacking := [r.method for r in table.rows if r.method not in having]):
            found.append(f"{column.label}: not measured for {', '.join(lacking)}.")
    return found


def markdown(table: Table) -> str:
    """The table in Markdown."""
    columns = table.columns()
    heading = ["method", "runs", *(column.label for column in columns)]
    rows = [[row.method, str(len(row.outcomes)), *(cell(column, row) for column in columns)] for row in table.rows]
    aligned = ["---", *["---:"] * (len(heading) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heading, aligned, *rows))


def cell(column: Column, row: Row) -> str:
    number = row.numbers[column.label]
    return "–" if number is None else column.shown(number)


def _table(group: str, lines: list[Line]) -> Table:
    methods = dict.fromkeys(line["method"] for line in lines)
    ordered = [name for name in (BASE, ORACLE) if name in methods]
    rows, curves = [], {}
    for method in dict.fromkeys([*ordered, *methods]):
        own = [line for line in lines if line["method"] == method]
        quality = [line for line in own if line["measurement"] == "quality"]
        if not quality:
            continue
        rows.append(
            Row(
                method=method,
                outcomes={
                    (line["task"], line["seed"]): (line["values"]["forgotten_rate"], line["values"]["retained_mean"])
                    for line in quality
                },
                numbers={column.label: _over_runs(column, own) for column in COLUMNS},
            )
        )
        if curve := _mean_curve([line["values"]["curve"] for line in own if line["measurement"] == "relearning"]):
            curves[method] = curve
    return Table(group=group, rows=rows, curves=curves)


def _current(lines: list[Line]) -> list[Line]:
    """The last line of each measurement with the settings that its case had last."""
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
    found = [column.find(line) for line in lines if line["measurement"] == column.measurement]
    numbers = [number for number in found if number is not None]
    return column.over_runs(numbers) if numbers else None


def _mean_curve(curves: list[list[list[float]]]) -> dict[int, float]:
    """The mean rate at each step that all have."""
    if not curves:
        return {}
    by_step = [{int(step): rate for step, rate in curve} for curve in curves]
    shared = [step for step in by_step[0] if all(step in each for each in by_step)]
    return {step: sum(each[step] for each in by_step) / len(by_step) for step in shared}


def _margin(theirs: Row, ours: Row) -> tuple[float, float] | None:
    """What they have more of; None where no run is shared."""
    shared = theirs.outcomes.keys() & ours.outcomes.keys()
    if not shared:
        return None
    forgotten = sum(theirs.outcomes[run][0] - ours.outcomes[run][0] for run in shared)
    retained = sum(theirs.outcomes[run][1] - ours.outcomes[run][1] for run in shared)
    # Means of shares over classes differ in their last bits.
    return round(forgotten / len(shared), 9), round(retained / len(shared), 9)


def _value(name: str) -> Callable[[Line], Number]:
    return lambda line: line["values"].get(name)


def _cost(name: str) -> Callable[[Line], Number]:
    return lambda line: None if line["cost"] is None else line["cost"][name]


def _steps_to_half(line: Line) -> Number:
    return next((float(step) for step, rate in line["values"]["curve"] if rate >= 0.5), math.inf)


def _steps(number: float) -> str:
    return "never" if math.isinf(number) else f"{number:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _digits(number: float) -> str:
    return f"{number:.3g}"


def _thousandths(number: float) -> str:
    return f"{1000 * number:.1f}"


def _mebibytes(number: float) -> str:
    return f"{number / 2**20:,.2f}" if number < 2**20 else f"{number / 2**20:,.0f}"


FORGOTTEN, RETAINED = "forgotten rate", "retained"

COLUMNS: Sequence[Column] = (
    Column(
        label=FORGOTTEN,
        note="share of images asked for the forgotten class in which the judge sees it; lower is better",
        measurement="quality",
        find=_value("forgotten_rate"),
        shown=_percent,
    ),
    Column(
        label=RETAINED,
        note="the same of the other classes, their mean; higher is better",
        measurement="quality",
        find=_value("retained_mean"),
        shown=_percent,
    ),
    Column(
        label="worst class",
        note="the least of them, over all runs",
        measurement="quality",
        find=_value("retained_worst"),
        shown=_percent,
        over_runs=min,
    ),
    Column(
        label="agreement",
        note="cosine of the retained classes' images with their prompts, by the judge's features and the text encoder",
        measurement="quality",
        find=_value("agreement_retained"),
        shown=_digits,
    ),
    Column(
        label="FID retained",
        note="Fréchet distance of the other classes' images from the real ones, in the judge's features",
        measurement="quality",
        find=_value("fid_retained"),
        shown=_digits,
    ),
    Column(
        label="FID all",
        note="the same with the forgotten class on both sides: what is forgotten is missed here",
        measurement="quality",
        find=_value("fid_all"),
        shown=_digits,
    ),
    Column(
        label="KID retained",
        note="kernel distance, of the same images and features as the Fréchet distance",
        measurement="quality",
        find=_value("kid_retained"),
        shown=_digits,
    ),
    Column(
        label="KID all",
        note="with the forgotten class",
        measurement="quality",
        find=_value("kid_all"),
        shown=_digits,
    ),
    Column(
        label="from oracle, retained",
        note="squared MMD x 1000, in a Gaussian kernel, from the images of the model retrained without the class",
        measurement="quality",
        find=_value("oracle_retained"),
        shown=_thousandths,
    ),
    Column(
        label="from oracle, forgotten",
        note="the same of the images asked for the forgotten class",
        measurement="quality",
        find=_value("oracle_forgotten"),
        shown=_thousandths,
    ),
    Column(
        label="steps to relearn",
        note="of fine-tuning on a few images of the class, until half of what is asked for is drawn; see the curve",
        measurement="relearning",
        find=_steps_to_half,
        shown=_steps,
    ),
    Column(
        label="inverted word",
        note="rate with a learned vector in the place of the word (CCE)",
        measurement="inversion",
        find=_value("rate"),
        shown=_percent,
    ),
    Column(
        label="found words",
        note="rate with three words before the prompt that a search has found (after UnlearnDiffAtk)",
        measurement="prompts",
        find=_value("rate"),
        shown=_percent,
    ),
    Column(
        label="CPU s",
        note="processor time of the whole command",
        measurement="quality",
        find=_cost("cpu_seconds"),
        shown=_digits,
    ),
    Column(
        label="wall s",
        note="the same on the clock, on a machine with other work",
        measurement="quality",
        find=_cost("seconds"),
        shown=_digits,
    ),
    Column(
        label="peak MiB",
        note="resident memory of the process, libraries included",
        measurement="quality",
        find=_cost("peak_bytes"),
        shown=_mebibytes,
    ),
    Column(
        label="artefact MiB",
        note="the mask, or the tensors that changed",
        measurement="quality",
        find=_cost("artefact_bytes"),
        shown=_mebibytes,
    ),
)
