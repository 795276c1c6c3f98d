import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from erasediff.cli import options
from erasediff.cli.commands.unlearn import build_job
from erasediff.cli.output import emit, messages
from erasediff.errors import UserError
from erasediff.io.disk_room import check_file
from erasediff.utils.versions import library_versions

if TYPE_CHECKING:
    from erasediff.training.job import TrainingJob
    from erasediff.workflows.benchmark_step import Bench


def bench(
    *,
    turns: Annotated[int, typer.Option(min=2, help="Timed steps of each contender.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Append a JSON line for each contender to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the results in --out, as .svg, .png or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    **flags: Any,
) -> None:
    """Measure an unlearning step on this machine beside plain fine-tuning on as many samples. Takes unlearn's flags.

    The settings are those of `erasediff unlearn`; samples are noise of the images' size, and nothing is saved.
    """
    if plot is not None and out is None:
        raise UserError("The plot is drawn from a file of results; name one with --out.")
    for path in (out, plot):
        if path is not None:
            check_file(path)
    _, job = build_job(**flags, dry_run=True)
    from erasediff.report.figures import FORMATS, draw
    from erasediff.training.job import TrainingJob
    from erasediff.workflows.benchmark_step import bench as measure

    if plot is not None and plot.suffix not in FORMATS:
        raise UserError(f"A plot is written as {', '.join(FORMATS)}, not as {plot.suffix or plot.name}.")
    assert isinstance(job, TrainingJob)
    with job.thread_scope(), messages.status("Warming up") as status:
        done = iter(range(1, turns + 3))
        result = measure(job, turns=turns, progress=lambda: status.update(f"Turn {next(done)} of {turns + 2}"))
    if out is not None:
        _append(out, _lines(result, job))
    if plot is not None and out is not None:
        draw(out, plot)
    emit(asdict(result), as_json=as_json, shown=None if as_json else _table(result))


bench.__signature__ = options.signature(bench, build_job)  # type: ignore[attr-defined]


def _lines(result: "Bench", job: "TrainingJob") -> list[dict[str, Any]]:
    common = {name: value for name, value in asdict(result).items() if name != "contenders"}
    common |= {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": str(job.config.unlearn.model),
        "load": round(os.getloadavg()[0], 1),
        "versions": library_versions(),
    }
    return [common | asdict(contender) for contender in result.contenders]


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    from erasediff.io.jsonl import MetricsFile

    path.parent.mkdir(parents=True, exist_ok=True)
    MetricsFile(path).append(lines)


def _table(result: "Bench") -> Table:
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        title=f"{result.device}, {result.precision}, {result.parameters_trained / 1e6:,.1f} M weights trained, "
        f"{result.contenders[0].samples} samples per step, {result.turns} turns",
        title_justify="left",
        caption="Ratio: to fine-tuning's time, in turns. FLOPs: used of the "
        f"{result.matmul_flops_per_second / 1e9:,.0f} GFLOP/s that a matrix product reached in the same turns. "
        "Update: Gram values, multiplier and weights, of the step.",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for column in ("samples/s", "ms (quartiles)", "ratio", "FLOPs", "peak MiB", "update"):
        table.add_column(column, justify="right", no_wrap=True)
    for contender in result.contenders:
        spread = f"{contender.first_quartile * 1e3:,.1f}-{contender.third_quartile * 1e3:,.1f}"
        table.add_row(
            contender.name,
            f"{contender.samples_per_second:,.1f}",
            f"{contender.seconds * 1e3:,.1f} ({spread})",
            f"{contender.times_fine_tuning:.3f}",
            f"{contender.flops_utilisation:.1%}",
            "?" if contender.peak_bytes is None else f"{contender.peak_bytes / 2**20:,.0f}",
            "" if contender.update_share is None else f"{contender.update_share:.1%}",
        )
    return table
