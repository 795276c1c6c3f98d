"""All methods on the nano Stable Diffusion and on the digits: ``python benchmarks/compare/run.py``.

JSON lines go to ``benchmarks/results/compare.jsonl``; the table and the page beside it are drawn from that file alone.
The nano model is the one that ``benchmarks/nano_sd/train.py`` puts into the cache, now if it is not there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from erasediff.comparison import ResultsFile, compare
from erasediff.comparison.digits_task import tasks_named
from erasediff.comparison.page import relearning, save, trade_off, verdict, write_page
from erasediff.comparison.table import Table, gaps, markdown
from erasediff.errors import UserError
from erasediff.io.atomic import atomic_write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nano_sd"))

from nano import NanoTask
from settings import METHODS

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(
    tasks: Annotated[str, typer.Option(help="As in nano/sneaker,digits/3; digits means all ten.")] = "nano/sneaker",
    methods: Annotated[str, typer.Option(help="With commas between them.")] = ",".join(["base", *METHODS]),
    seeds: Annotated[str, typer.Option(help="With commas between them.")] = "0",
    results: Annotated[Path, typer.Option(help="The JSON lines.")] = RESULTS / "compare.jsonl",
    runs: Annotated[Path, typer.Option(help="Where the run folders and the page go.")] = Path("runs/compare"),
    draw: Annotated[bool, typer.Option("--draw", help="Only draw table, plots and page again.")] = False,
) -> None:
    torch.set_num_threads(1)
    console, lines = Console(stderr=True), ResultsFile(results)
    named = tasks.split(",")
    try:
        chosen = [NanoTask(garment=name.removeprefix("nano/")) for name in named if name.startswith("nano/")]
        digits = [name for name in named if not name.startswith("nano/")]
        if not draw:
            compare(
                [*chosen, *(tasks_named(digits) if digits else [])],
                methods.split(","),
                [int(seed) for seed in seeds.split(",")],
                lines=lines,
                runs=runs,
                console=console,
            )
        runs.mkdir(parents=True, exist_ok=True)
        tables = write_page(runs / "report.html", lines, "python benchmarks/compare/run.py")
        for table in tables:
            save(table, trade_off, results.with_name(f"{results.stem}-{table.group}.svg"))
            save(table, relearning, results.with_name(f"{results.stem}-{table.group}-relearning.svg"))
        atomic_write(results.with_suffix(".md"), "\n".join(_section(table) for table in tables))
    except UserError as error:
        console.print(str(error), style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _section(table: Table) -> str:
    columns = "".join(f"- {column.label}: {column.note}\n" for column in table.columns())
    missing = "".join(f"- {gap}\n" for gap in gaps(table))
    return f"## {table.group}\n\n{verdict(table)}\n\n{markdown(table)}\n{columns}\nNot measured:\n\n{missing}"


if __name__ == "__main__":
    typer.run(main)
