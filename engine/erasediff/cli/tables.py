"""Several models, or several plans, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from erasediff.cli.output import readable, readable_name

if TYPE_CHECKING:
    from erasediff.evaluation import ConditionalMetrics, UnconditionalMetrics
    from erasediff.stages.evaluation import Metrics


def metrics_table(columns: Mapping[str, Metrics]) -> Table:
    """One column per model, all of them of the same kind; a row per class, then the totals."""
    from erasediff.evaluation import ConditionalMetrics, UnconditionalMetrics

    every = list(columns.values())
    conditional = [metrics for metrics in every if isinstance(metrics, ConditionalMetrics)]
    unconditional = [metrics for metrics in every if isinstance(metrics, UnconditionalMetrics)]
    table = Table("Recognised when asked for" if conditional else "Share of all images", *columns)
    for name, values in _conditional_rows(conditional) if conditional else _unconditional_rows(unconditional):
        table.add_row(name, *values)
    return table


def plans_table(plans: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column per plan (see ``erasediff.stages.plan.Plan``)."""
    table = Table("", *plans)
    for name in next(iter(plans.values())):
        table.add_row(readable_name(name), *(readable(name, plan[name]) for plan in plans.values()))
    return table


def _conditional_rows(columns: Sequence[ConditionalMetrics]) -> list[tuple[str, list[str]]]:
    base = columns[0]
    return [
        *_class_rows([metrics.recognised for metrics in columns], base.forget),
        ("forgotten", [f"{metrics.forgotten_rate:.2%}" for metrics in columns]),
        ("forgotten, 95% bound", [f"{metrics.forgotten_bound:.2%}" for metrics in columns]),
        ("forgotten, like none", [f"{metrics.forgotten_none:.1%}" for metrics in columns]),
        ("others, mean", [f"{metrics.retained_mean:.1%}" for metrics in columns]),
        ("others, worst", [f"{metrics.retained_worst:.1%}" for metrics in columns]),
        ("others, worst drop", [f"{metrics.worst_drop(base):.1%}" for metrics in columns]),
        ("discrepancy x 1000", [f"{1000 * metrics.discrepancy:.2f}" for metrics in columns]),
    ]


def _unconditional_rows(columns: Sequence[UnconditionalMetrics]) -> list[tuple[str, list[str]]]:
    base = columns[0]
    return [
        *_class_rows([metrics.shares for metrics in columns], base.forget),
        ("like none", [f"{metrics.none:.1%}" for metrics in columns]),
        ("forgotten, 95% bound", [f"{metrics.forgotten_bound:.2%}" for metrics in columns]),
        ("forgotten, of base's", [f"{metrics.remaining(base):.1%}" for metrics in columns]),
        ("others, largest shift", [f"{metrics.largest_shift(base):.1%}" for metrics in columns]),
        ("discrepancy x 1000", [f"{1000 * metrics.discrepancy:.2f}" for metrics in columns]),
    ]


def _class_rows(shares: Sequence[Sequence[float]], forget: Sequence[int]) -> list[tuple[str, list[str]]]:
    """Per class, its share in each column."""
    return [
        (f"class {number}{' (forgotten)' if number in forget else ''}", [f"{share:.1%}" for share in of_class])
        for number, of_class in enumerate(zip(*shares, strict=True))
    ]
