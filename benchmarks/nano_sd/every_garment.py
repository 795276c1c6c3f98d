"""Forget each garment with no flag but model, data and what to forget, and measure with a classifier the run never saw.

``python benchmarks/nano_sd/every_garment.py`` appends a line per garment to ``results/every_garment.jsonl``: what the
run's own verdict says, and beside it what the classifier of ``train.py`` sees. Runs that are in ``--runs`` already are
measured, not repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from fashion import CLASSES, DEBIAN_FOLDER
from judge import Judge
from measure import CACHE, measure
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from record import append, environment

COUNT, SEED = 40, 7
"""Images of each garment, and their seed: none that a run or its verdict draws from."""


def main(
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/every-garment"),
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST.")] = DEBIAN_FOLDER,
) -> None:
    console, judge = Console(stderr=True), Judge.load(CACHE / "judge")

    def recognised(model: Path) -> dict[str, float]:
        found: dict[str, float] = measure(model, judge, data, COUNT, SEED, console=console)["recognised"]
        return found

    before = recognised(CACHE / "model")
    for garment in CLASSES:
        run = runs / garment.replace(" ", "-")
        if not (run / "verdict.json").is_file():
            _unlearn(garment, run)
        verdict = json.loads((run / "verdict.json").read_text())
        after = recognised(run / verdict["model"])
        drops = {name: before[name] - after[name] for name in CLASSES if name != garment}
        worst = max(drops, key=lambda name: drops[name])
        line = {
            "forgotten": garment,
            "verdict": verdict["verdict"],
            "steps": len((run / "metrics.jsonl").read_text().splitlines()),
            "images_per_class": COUNT,
            "left": after[garment],
            "mean_drop_of_others": sum(drops.values()) / len(drops),
            "worst_drop": drops[worst],
            "worst": worst,
            **environment("cpu"),
        }
        append("every_garment", [line])
        print(json.dumps({name: line[name] for name in ("forgotten", "verdict", "left", "worst", "worst_drop")}))


def _unlearn(garment: str, run: Path) -> None:
    """The command as a new user types it; exit code 3 is a verdict like another."""
    command: list[Any] = [sys.executable, "-m", "erasediff.cli", "unlearn"]
    command += ["--model", CACHE / "model", "--data", CACHE / "data", "--forget-class", garment, "--out", run]
    code = subprocess.run(list(map(str, command)), check=False).returncode
    if code not in (0, 3):
        raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
