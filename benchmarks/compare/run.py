"""All methods on the nano Stable Diffusion and on the digits: ``python benchmarks/compare/run.py``.

JSON lines go to ``benchmarks/results/compare.jsonl``; the table and the page beside it are drawn from that file alone.
The nano model has to be there (``benchmarks/nano_sd/train.py``).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from erasediff.comparison import Lines, compare
from erasediff.comparison.digits import tasks_named
from erasediff.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nano_sd"))

from nano import NanoTask
from settings import METHODS

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(
    tasks: Annotated[str, typer.Option(help="As in nano/sneaker,digits/3; digits means all ten.")] = "nano/sneaker",
    methods: Annotated[str, typer.Option(help="With commas between them.")] = ",".join(["base", *METHODS]),
    seeds: Annotated[str, typer.Option(help="With commas between them.")] = "0",
    results: Annotated[Path, typer.Option(help="The JSON lines.")] = RESULTS / "compare.jsonl",
    runs: Annotated[Path, typer.Option(help="Where the run folders go.")] = Path("runs/compare"),
) -> None:
    torch.set_num_threads(1)
    console = Console(stderr=True)
    named = tasks.split(",")
    try:
        chosen = [NanoTask(garment=name.removeprefix("nano/")) for name in named if name.startswith("nano/")]
        digits = [name for name in named if not name.startswith("nano/")]
        compare(
            [*chosen, *(tasks_named(digits) if digits else [])],
            methods.split(","),
            [int(seed) for seed in seeds.split(",")],
            lines=Lines(results),
            runs=runs,
            console=console,
        )
    except UserError as error:
        console.print(str(error), style="red", highlight=False)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
