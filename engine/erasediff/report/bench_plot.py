"""A plot of what ``erasediff bench`` has measured, from its file of JSON lines and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from erasediff.errors import UserError
from erasediff.report.curves import LIGHT
from erasediff.report.figures import save_figure
from erasediff.runs.metrics import MetricsFile

FORMATS = (".svg", ".png", ".pdf")


def draw(results: Path, plot: Path) -> None:
    """Milliseconds per step of each contender, bars from quartile to quartile, for the last line of each model.

    UserError for another format than those of ``FORMATS``, and for what the disk refuses.
    """
    if plot.suffix not in FORMATS:
        raise UserError(f"A plot is written as {', '.join(FORMATS)}, not as {plot.suffix or plot.name}.")
    latest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in MetricsFile(results).read():
        latest[line["model"], line["device"], line["name"]] = line
    figure = Figure(figsize=(6.4, 1.2 + 0.55 * len(latest)), layout="constrained")
    axes = figure.subplots()
    for row, ((model, _, name), line) in enumerate(latest.items()):
        middle = line["seconds"] * 1e3
        low, high = middle - line["first_quartile"] * 1e3, line["third_quartile"] * 1e3 - middle
        colour = LIGHT["lines"][0 if name == "erasediff" else 1]
        axes.barh(row, middle, xerr=[[low], [high]], color=colour, height=0.6)
        axes.text(0, row, f" {line['samples_per_second']:,.1f} samples/s", va="center", color="white", fontsize=8)
        latest[model, line["device"], name] = line | {"label": f"{Path(model).name}\n{line['device']}: {name}"}
    axes.set_yticks(range(len(latest)), [line["label"] for line in latest.values()])
    axes.invert_yaxis()
    axes.set_xlabel("ms per step (median; lines: quartiles)")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, plot)
