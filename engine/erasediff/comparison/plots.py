"""Pictures of a table, drawn from its numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erasediff.comparison.table import FORGOTTEN, RETAINED, Table
from erasediff.report.curves import DARK, LIGHT
from erasediff.report.figures import figure_url, save_figure

Draw = Callable[[Axes, Table, Mapping[str, Any]], None]
METHODS_COLOURED = ("erasediff", "salun", "esd", "pruning")
"""In the lines' colours; every other method is grey, told apart by its marker."""

MARKERS = "osDv^<>Pph"
LEAST_DRAWN = 0.5
"""Of the other classes, for a point among those that can be told apart."""


def data_url(table: Table, draw: Draw, *, dark: bool) -> str:
    """A PNG with a clear background, in a URL."""
    return figure_url(_figure(table, draw, DARK if dark else LIGHT))


def save(table: Table, draw: Draw, path: Path) -> None:
    """As a file of the kind that its name says, for light pages. UserError for what the disk refuses."""
    save_figure(_figure(table, draw, LIGHT), path)


def trade_off(axes: Axes, table: Table, style: Mapping[str, Any]) -> None:
    """A point per method: what is forgotten to the left, what is retained above.

    A method that ruined the model is named below: its point would press all others into one corner.
    """
    ruined = []
    for number, row in enumerate(table.rows):
        forgotten, retained = row.numbers[FORGOTTEN], row.numbers[RETAINED]
        if forgotten is None or retained is None:
            continue
        if retained < LEAST_DRAWN:
            ruined.append(f"{row.method} ({100 * forgotten:.0f}, {100 * retained:.1f})")
            continue
        marker = MARKERS[number % len(MARKERS)]
        colour = _colour(row.method, style)
        axes.plot(100 * forgotten, 100 * retained, marker, color=colour, label=row.method)
    below = f"\nfar below: {', '.join(ruined)}" if ruined else ""
    axes.set_xlabel(f"forgotten class still drawn, %{below}", color=style["text"], fontsize=9)
    axes.set_ylabel("other classes drawn, %", color=style["text"], fontsize=9)


def relearning(axes: Axes, table: Table, style: Mapping[str, Any]) -> None:
    """A line per method: how the rate returns over the steps of fine-tuning on a few images."""
    for number, (method, curve) in enumerate(table.curves.items()):
        marker = MARKERS[number % len(MARKERS)]
        colour = _colour(method, style)
        axes.plot(list(curve), [100 * rate for rate in curve.values()], marker=marker, color=colour, label=method)
    axes.set_xlabel("steps of relearning", color=style["text"], fontsize=9)
    axes.set_ylabel("forgotten class drawn, %", color=style["text"], fontsize=9)


def _figure(table: Table, draw: Draw, style: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(5.2, 3.4), dpi=160, layout="constrained")
    axes = figure.subplots()
    draw(axes, table, style)
    axes.tick_params(colors=style["text"], labelsize=8, length=0)
    axes.grid(color=style["grid"], linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.legend(labelcolor=style["text"], fontsize=7, frameon=False)
    return figure


def _colour(method: str, style: Mapping[str, Any]) -> str:
    colours: tuple[str, ...] = style["lines"]
    named = dict(zip(METHODS_COLOURED, colours, strict=True))
    grey: str = style["text"]
    return named.get(method, grey)
