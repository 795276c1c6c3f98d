import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from erasediff.cli import options
from erasediff.cli.output import emit, loading, messages
from erasediff.io.disk_room import check_folder

if TYPE_CHECKING:
    from rich.table import Table as Shown

    from erasediff.comparison.table import Table

SHORT_METHODS = "base,erasediff,finetune"


def compare(
    *,
    tasks: Annotated[
        str | None, typer.Option(help="What to forget: digits for each of the ten, or such as digits/3,digits/8.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods such as base,erasediff,salun; base is the original model. By default all."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of the unlearning, such as 0,1,2.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for results, report and runs; runs that are there are not repeated."),
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="A smoke test: one digit, few steps; the numbers mean nothing.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Compare methods of unlearning on the digits: table, attacks and a report page.

    Each run is a command of its own, so that time and memory are the method's. An interrupted comparison goes on with
    the same command.
    """
    folder = out or Path("runs", "compare-short" if short else "compare")
    check_folder(folder)
    with loading(messages):
        from erasediff.comparison import ResultsFile
        from erasediff.comparison import compare as measured
        from erasediff.comparison.digits_task import METHODS, tasks_named
        from erasediff.comparison.page import verdict, write_page
    lines = ResultsFile(folder / "compare.jsonl")
    measured(
        tasks_named((tasks or ("digits/3" if short else "digits")).split(","), short=short),
        (methods or (SHORT_METHODS if short else ",".join(METHODS))).split(","),
        options.whole_numbers(seeds or ("0" if short else "0,1,2"), "Seeds"),
        lines=lines,
        runs=folder / "runs",
        console=messages,
    )
    page = folder / "report.html"
    found = write_page(page, lines, shlex.join(["erasediff", *sys.argv[1:]]))
    result = {
        "lines": str(lines.path),
        "report": str(page),
        "verdict": {table.group: verdict(table) for table in found},
        "rows": {table.group: {row.method: dict(row.numbers) for row in table.rows} for table in found},
    }
    if as_json:
        emit(result, as_json=True)
        return
    from rich.console import Group

    emit(result, as_json=False, shown=Group(*(_shown(table) for table in found), f"Report: {page}"))


def _shown(table: "Table") -> "Shown":
    from rich.table import Table as Shown

    from erasediff.comparison.table import cell

    shown = Shown(table.group, *(row.method for row in table.rows))
    for column in table.columns():
        shown.add_row(column.label, *(cell(column, row) for row in table.rows))
    return shown
