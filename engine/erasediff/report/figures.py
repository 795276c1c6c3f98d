"""Figures: training curves and benchmark bars, as files and as data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_file
from erasediff.io.jsonl import MetricsFile

WITHOUT_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure in the format of the suffix, reproducibly to the byte. UserError if the disk refuses."""
    with atomic_file(path) as partial, rc_context({"svg.hashsalt": path.name}):
        figure.savefig(partial, format=path.suffix.removeprefix("."), metadata=WITHOUT_DATE.get(path.suffix))


def figure_url(figure: Figure) -> str:
    """Data URL of a figure as a PNG with a transparent background."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


QUANTITIES = {"retain_loss": "Retain loss", "forget_loss": "Forget loss", "multiplier": "Multiplier λ"}
LIGHT = {"text": "#52525b", "grid": "#e4e4e7", "lines": ("#2563eb", "#d97706", "#059669", "#7c3aed")}
DARK = {"text": "#a1a1aa", "grid": "#3f3f46", "lines": ("#60a5fa", "#fbbf24", "#34d399", "#a78bfa")}


class Recorded(Protocol):
    """Run with the records of its steps."""

    @property
    def title(self) -> str: ...

    @property
    def records(self) -> Sequence[Mapping[str, Any]]:
        """Records of each step, as in metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A run by its title and the records of its steps."""

    title: str
    records: Sequence[Mapping[str, Any]]


def curve(columns: Sequence[Recorded], quantity: str, *, dark: bool) -> str:
    """Plot ``quantity`` over the steps as a data URL: a line per column that recorded it.

    A column has the colour of its place, whichever others are drawn. The bold line is a running mean over a twentieth
    of the steps; the faint one is every step.
    """
    style: Mapping[str, Any] = DARK if dark else LIGHT
    figure = Figure(figsize=(4.2, 2.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    for column, colour in zip(columns, style["lines"], strict=False):
        steps, values = _series(column.records, quantity)
        if len(steps):
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _running_mean(values, max(1, len(values) // 20)), color=colour, label=column.title)
    _dress(axes, style)
    return figure_url(figure)


def recorded(columns: Sequence[Recorded]) -> dict[str, list[Recorded]]:
    """Columns that recorded a quantity, by quantity."""
    by_quantity = {q: [column for column in columns if len(_series(column.records, q)[0])] for q in QUANTITIES}
    return {quantity: recording for quantity, recording in by_quantity.items() if recording}


def _series(records: Sequence[Mapping[str, Any]], quantity: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(steps, values) of the records in which the quantity is a number."""
    points = [(record["step"], record[quantity]) for record in records if record.get(quantity) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean over the last ``window`` values, fewer at the beginning."""
    total = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    mean: NDArray[np.float64] = (total[ends] - total[starts]) / (ends - starts)
    return mean


def _dress(axes: Axes, style: Mapping[str, Any]) -> None:
    axes.set_xlabel("step", color=style["text"], fontsize=9)
    axes.tick_params(colors=style["text"], labelsize=8, length=0)
    axes.grid(color=style["grid"], linewidth=0.6)
    axes.spines[:].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(labelcolor=style["text"], fontsize=8, frameon=False)


FORMATS = (".svg", ".png", ".pdf")


def draw(results: Path, plot: Path) -> None:
    """Plot milliseconds per step of each contender: bars from quartile to quartile, for the last line of each model.

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
