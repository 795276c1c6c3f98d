"""Forget one garment after another, each request following the last by ``--after``, and measure all of them each time.

``python benchmarks/sequential/measure_sequence.py --garments coat,sneaker,bag`` appends a JSON line per request to
``results/sequential.jsonl``. The model and the classifier are those of ``benchmarks/nano_sd``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1] / "nano_sd"))
sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from fashion import CLASSES, DEBIAN_FOLDER
from judge import Judge
from measure import CACHE, measure
from record import append, environment


def main(
    garments: Annotated[str, typer.Option(help="What to forget, in this order.")] = "coat,sneaker,bag,dress,sandal",
    share: Annotated[float, typer.Option(help="images.rehearsal_share; 0 is the plain sequence.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Of the runs and of the images that are judged.")] = 0,
    count: Annotated[int, typer.Option(help="Images per class.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for the runs; one that exists is removed.")] = Path("runs/sequence"),
    record: Annotated[bool, typer.Option(help="Append the lines to the committed results.")] = True,
) -> None:
    requests = garments.split(",")
    unknown = set(requests) - set(CLASSES)
    if unknown:
        raise typer.BadParameter(f"there is no {min(unknown)}: choose among {', '.join(CLASSES)}")
    shutil.rmtree(out, ignore_errors=True)
    judge, quiet = Judge.load(CACHE / "judge"), Console(quiet=True)
    start = measure(CACHE / "model", judge, DEBIAN_FOLDER, count, seed, console=quiet)["recognised"]
    previous: Path | None = None
    for number, garment in enumerate(requests):
        run = out / f"{number}-{garment.replace(' ', '-')}"
        before = ("--model", CACHE / "model") if previous is None else ("--after", previous)
        previous = run
        began = time.perf_counter()
        _erasediff(
            "unlearn", *before, "--data", CACHE / "data", "--forget-class", garment, "--out", run, "--seed", seed,
            "--set", f"images.rehearsal_share={share}", "--set", "images.encode_batch_size=100",
        )  # fmt: skip
        seconds = time.perf_counter() - began
        _erasediff("verify", run)
        found = measure(run / "model", judge, DEBIAN_FOLDER, count, seed, console=quiet)["recognised"]
        line = {"garments": requests, "rehearsal_share": share, "seed": seed, "images_per_class": count}
        line |= _result(number, requests[: number + 1], start, found) | {"seconds": round(seconds, 1)}
        print(line, flush=True)
        if record:
            append("sequential", [{**line, **environment("cpu")}])


def _erasediff(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "erasediff.cli", *map(str, arguments)], check=True, stdout=sys.stderr)


def _result(number: int, gone: list[str], start: dict[str, float], found: dict[str, float]) -> dict[str, Any]:
    """Shares of samples in which the classifier sees what the prompt says, of all requests so far and of the others."""
    others = [name for name in CLASSES if name not in gone]
    return {
        "request": number + 1,
        "forgotten": {name: found[name] for name in gone},
        "others": {name: found[name] for name in others},
        "largest_forgotten": max(found[name] for name in gone),
        "others_of_start": sum(found[name] for name in others) / sum(start[name] for name in others),
    }


if __name__ == "__main__":
    typer.run(main)
