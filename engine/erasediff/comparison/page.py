"""The report page of a comparison: one HTML file, from the lines and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from erasediff.comparison.lines import Lines
from erasediff.comparison.plots import data_url, relearning, trade_off
from erasediff.comparison.table import FORGOTTEN, RETAINED, Line, Table, cell, gaps, tables
from erasediff.report.table import points
from erasediff.report.templates import template_environment
from erasediff.runs.atomic import atomic_write

OURS = "erasediff"


def write_page(path: Path, lines: Lines, command: str) -> list[Table]:
    """Write the page of ``lines`` to ``path`` and return its tables; ``command`` is what it says to repeat."""
    read = lines.read()
    found = tables(read)
    template = template_environment().get_template("compare.html.j2")
    page = template.render(
        tables=[
            {
                "table": table,
                "columns": table.columns(),
                "cells": [[cell(column, row) for column in table.columns()] for row in table.rows],
                "verdict": verdict(table),
                "gaps": gaps(table),
                "chosen": _chosen(read, table),
                "figures": [
                    {
                        "title": title,
                        "light": data_url(table, draw, dark=False),
                        "dark": data_url(table, draw, dark=True),
                    }
                    for title, draw, there in (
                        ("Forgetting against retention", trade_off, table.rows),
                        ("Relearning", relearning, table.curves),
                    )
                    if there
                ],
            }
            for table in found
        ],
        ours=OURS,
        command=command,
        measured=_measured(read),
    )
    atomic_write(path, page)
    return found


def verdict(table: Table) -> str:
    """Whether a method beats EraseDiff on both counts, in a sentence."""
    if OURS not in [row.method for row in table.rows]:
        return "EraseDiff was not run."
    better = table.better_than(OURS)
    if not better:
        return "On the same runs, no method is as good as EraseDiff in forgetting and retention and better in one."
    margins = [
        f"{method} ({FORGOTTEN} {points(forgotten)}, {RETAINED} {points(retained)} points)"
        for method, (forgotten, retained) in better.items()
    ]
    return (
        "On the runs that both have, nowhere worse than EraseDiff in forgetting and retention, and somewhere better: "
        f"{', '.join(margins)}."
    )


def _chosen(lines: Sequence[Line], table: Table) -> dict[str, dict[str, object]]:
    """What each method was run with last."""
    return {
        line["method"]: line["chosen"]
        for line in lines
        if line["task"].partition("/")[0] == table.group and line["chosen"]
    }


def _measured(lines: Sequence[Line]) -> dict[str, str]:
    """What the numbers may depend on, all values that occur."""
    versions = {name: {line["versions"][name] for line in lines} for line in lines for name in line["versions"]}
    loads = [line["load"] for line in lines]
    return {
        "commit": ", ".join(sorted({line["commit"] or "unknown" for line in lines})),
        **{name: ", ".join(sorted(values)) for name, values in versions.items()},
        "device": ", ".join(sorted({line["device"] for line in lines})),
        "load of the machine": f"{min(loads)} to {max(loads)}" if loads else "unknown",
    }
