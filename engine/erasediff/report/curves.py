"""Curves of the losses and the multiplier, once for light pages and once for dark ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from erasediff.report.contents import Column
from erasediff.report.figures import figure_url

QUANTITIES = {"retain_loss": "Retain loss", "forget_loss": "Forget loss", "multiplier": "Multiplier λ"}
LIGHT = {"text": "#52525b", "grid": "#e4e4e7", "lines": ("#2563eb", "#d97706", "#059669", "#7c3aed")}
DARK = {"text": "#a1a1aa", "grid": "#3f3f46", "lines": ("#60a5fa", "#fbbf24", "#34d399", "#a78bfa")}


def curve(columns: Sequence[Column], quantity: str, *, dark: bool) -> str:
    """A data URL: ``quantity`` over the steps, a line for each column that recorded it; clear background.

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


def recorded(columns: Sequence[Column]) -> dict[str, list[Column]]:
    """For each quantity that any column recorded, the columns that did."""
    found = {q: [column for column in columns if len(_series(column.records, q)[0])] for q in QUANTITIES}
    return {quantity: having for quantity, having in found.items() if having}


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
