"""From lines to a table: for each group of tasks, a row per method, a column per number."""

from __future__ import annotations

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
    """``numbers`` by the column's label, over ``runs``: tasks of the group times seeds."""

    method: str
    runs: int
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    numbers: Mapping[str, Number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One group: base and oracle first, then as the lines came; ``curves`` of relearning, the rate by step."""

    group: str
    rows: Sequence[Row]
    curves: Mapping[str, Mapping[int, float]]

    def columns(self) -> list[Column]:
        """Those of which there is any number."""
        return [column for column in COLUMNS if any(row.numbers[column.label] is not None for row in self.rows)]

    def better_than(self, method: str) -> list[str]:
        """Methods that are nowhere worse in forgetting and retention than ``method``, and somewhere better.

        Base and oracle are no contenders, nor is a method of other tasks and seeds.
        """
        rows = {row.method: row for row in self.rows if row.method not in (BASE, ORACLE)}
        ours = rows.get(method)
        if ours is None:
            return []
        return [
            row.method
            for row in rows.values()
            if (row.tasks, row.seeds) == (ours.tasks, ours.seeds) and _dominates(row.numbers, ours.numbers)
        ]


def tables(lines: Iterable[Line]) -> list[Table]:
    """A table per group of tasks. Of a case that was measured with several settings, the last ones count."""
    chosen = _current(list(lines))
    groups = dict.fromkeys(_group(line) for line in chosen)
    return [_table(group, [line for line in chosen if _group(line) == group]) for group in groups]


def gaps(table: Table) -> list[str]:
    """What the table does not tell, in sentences; they are part of the result."""
    found = []
    fewest = min(len(row.seeds) for row in table.rows)
    if fewest < 3:
        found.append(f"Only {fewest} seed{'s' if fewest > 1 else ''} of three: differences of a point are noise.")
    most = {task for row in table.rows for task in row.tasks}
    found += [
        f"{row.method} was not run on {', '.join(sorted(most - set(row.tasks)))}."
        for row in table.rows
        if most - set(row.tasks)
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
    rows = [[row.method, str(row.runs), *(cell(column, row) for column in columns)] for row in table.rows]
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
                runs=len(quality),
                seeds=tuple(sorted({line["seed"] for line in quality})),
                tasks=tuple(sorted({line["task"] for line in quality})),
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


def _dominates(theirs: Mapping[str, Number], ours: Mapping[str, Number]) -> bool:
    # As losses: less is better.
    pairs = [(theirs[FORGOTTEN], ours[FORGOTTEN]), (_negated(theirs[RETAINED]), _negated(ours[RETAINED]))]
    known = [(their, our) for their, our in pairs if their is not None and our is not None]
    return (
        len(known) == len(pairs)
        and all(their <= our for their, our in known)
        and any(their < our for their, our in known)
    )


def _negated(number: Number) -> Number:
    return None if number is None else -number


def _value(name: str) -> Callable[[Line], Number]:
    return lambda line: line["values"].get(name)


def _cost(name: str) -> Callable[[Line], Number]:
    return lambda line: None if line["cost"] is None else line["cost"][name]


def _last_rate(line: Line) -> Number:
    rate: float = line["values"]["curve"][-1][1]
    return rate


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
        note="squared MMD x 1000 of the images from those of the model retrained without the class",
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
        label="relearned",
        note="rate after the last step of fine-tuning on a few images of the class; the curve is below",
        measurement="relearning",
        find=_last_rate,
        shown=_percent,
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
