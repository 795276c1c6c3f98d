"""HTML page of a comparison, with its plots, made from the results file alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erasediff.comparison.columns import FORGOTTEN, RETAINED, Line
from erasediff.comparison.results_file import ResultsFile
from erasediff.comparison.table import Table, cell, gaps, tables
from erasediff.io.atomic import atomic_write
from erasediff.report.contents import points
from erasediff.report.figures import DARK, LIGHT, figure_url, save_figure
from erasediff.report.render import template_environment

Draw = Callable[[Axes, Table, Mapping[str, Any]], None]
METHODS_COLOURED = ("erasediff", "salun", "esd", "pruning")
"""Methods drawn in colour; the others are grey, distinguished by markers."""

MARKERS = "osDv^<>PX*"
MIN_SHOWN_RETENTION = 0.5
"""Retain accuracy below which a method is named under the plot instead of drawn."""


def data_url(table: Table, draw: Draw, *, dark: bool) -> str:
    """Data URL of a figure as a PNG with a transparent background."""
    return figure_url(_figure(table, draw, DARK if dark else LIGHT))


def save(table: Table, draw: Draw, path: Path) -> None:
    """Save a figure in the format of the file name's suffix, for light pages. UserError if the disk refuses."""
    save_figure(_figure(table, draw, LIGHT), path)


def trade_off(axes: Axes, table: Table, style: Mapping[str, Any]) -> None:
    """Plot the trade-off: a point per method, unlearning accuracy to the right, retain accuracy upwards.

    A method that ruined the model is named below: its point would press all others into one corner.
    """
    ruined = []
    for number, row in enumerate(table.rows):
        forgotten, retained = row.numbers[FORGOTTEN], row.numbers[RETAINED]
        if forgotten is None or retained is None:
            continue
        if retained < MIN_SHOWN_RETENTION:
            ruined.append(f"{row.method} ({100 - 100 * forgotten:.0f}, {100 * retained:.1f})")
            continue
        marker = MARKERS[number % len(MARKERS)]
        colour = _colour(row.method, style)
        axes.plot(100 - 100 * forgotten, 100 * retained, marker, color=colour, label=row.method)
    below = f"\nfar below: {', '.join(ruined)}" if ruined else ""
    axes.set_xlabel(f"unlearning accuracy (UA), %{below}", color=style["text"], fontsize=9)
    axes.set_ylabel("retain accuracy (RA), %", color=style["text"], fontsize=9)


def relearning(axes: Axes, table: Table, style: Mapping[str, Any]) -> None:
    """Plot relearning curves: a line per method, the rate over steps of fine-tuning on a few images."""
    for number, (method, curve) in enumerate(table.curves.items()):
        marker = MARKERS[number % len(MARKERS)]
        colour = _colour(method, style)
        axes.plot(list(curve), [100 * rate for rate in curve.values()], marker=marker, color=colour, label=method)
    axes.set_xlabel("fine-tuning steps", color=style["text"], fontsize=9)
    axes.set_ylabel("forgotten class recognised, %", color=style["text"], fontsize=9)


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


OURS = "erasediff"


def write_page(path: Path, lines: ResultsFile, command: str) -> list[Table]:
    """Write the page of ``lines`` to ``path`` and return its tables; ``command`` is printed on it."""
    results = lines.read()
    page_tables = tables(results)
    template = template_environment().get_template("compare.html.j2")
    page = template.render(
        tables=[
            {
                "table": table,
                "columns": table.columns(),
                "cells": [[cell(column, row) for column in table.columns()] for row in table.rows],
                "verdict": verdict(table),
                "gaps": gaps(table),
                "chosen": _chosen(results, table),
                "figures": [
                    {
                        "title": title,
                        "light": data_url(table, draw, dark=False),
                        "dark": data_url(table, draw, dark=True),
                    }
                    for title, draw, there in (
                        ("Unlearning against retention", trade_off, table.rows),
                        ("Relearning", relearning, table.curves),
                    )
                    if there
                ],
            }
            for table in page_tables
        ],
        ours=OURS,
        command=command,
        measured=_measured(results),
    )
    atomic_write(path, page)
    return page_tables


def verdict(table: Table) -> str:
    """Sentence on whether a method beats EraseDiff in both unlearning and retain accuracy."""
    if OURS not in [row.method for row in table.rows]:
        return "EraseDiff was not run."
    better = table.better_than(OURS)
    if not better:
        return "On the same runs, no method matches EraseDiff in both UA and RA and exceeds it in one."
    margins = [
        f"{method} (UA {points(-forgotten)}, RA {points(retained)} percentage points)"
        for method, (forgotten, retained) in better.items()
    ]
    return (
        "On the runs that both have, at least as good as EraseDiff in both UA and RA, and better in one: "
        f"{', '.join(margins)}."
    )


def _chosen(lines: Sequence[Line], table: Table) -> dict[str, dict[str, object]]:
    """Settings of each method's last run."""
    return {
        line["method"]: line["chosen"]
        for line in lines
        if line["task"].partition("/")[0] == table.group and line["chosen"]
    }


def _measured(lines: Sequence[Line]) -> dict[str, str]:
    """Commit, versions and machine of all lines."""
    versions = {name: {line["versions"][name] for line in lines} for line in lines for name in line["versions"]}
    loads = [line["load"] for line in lines]
    return {
        "commit": ", ".join(sorted({line["commit"] or "unknown" for line in lines})),
        **{name: ", ".join(sorted(values)) for name, values in versions.items()},
        "device": ", ".join(sorted({line["device"] for line in lines})),
        "load of the machine": f"{min(loads)} to {max(loads)}" if loads else "unknown",
    }
