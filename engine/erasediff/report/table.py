"""The metrics table: a row per number, a column per model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from erasediff.evaluation import ConditionalMetrics, UnconditionalMetrics
from erasediff.report.contents import Column, Contents


class Row(NamedTuple):
    """``note`` explains the number to someone who sees it for the first time."""

    label: str
    note: str
    values: Sequence[str]


def percent(share: float) -> str:
    return "–" if share != share else f"{100 * share:.1f}%"


def points(share: float) -> str:
    """A difference of shares, in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def metric_rows(contents: Contents) -> list[Row]:
    """The rows for the kind of model that the report is about."""
    metrics = [column.metrics for column in contents.columns]
    conditional = [m for m in metrics if isinstance(m, ConditionalMetrics)]
    unconditional = [m for m in metrics if isinstance(m, UnconditionalMetrics)]
    if conditional and unconditional:
        raise ValueError("a report compares conditional models or unconditional ones, not both")
    return _conditional_rows(conditional) if conditional else _unconditional_rows(unconditional)


def _conditional_rows(metrics: list[ConditionalMetrics]) -> list[Row]:
    base = metrics[0]

    def row(label: str, note: str, value: Callable[[ConditionalMetrics], str]) -> Row:
        return Row(label, note, [value(m) for m in metrics])

    return [
        row("Forgotten, recognised", "asked for it, the judge sees it", lambda m: percent(m.forgotten_rate)),
        row("… 95% upper bound", "of that share, by the number of images", lambda m: percent(m.forgotten_bound)),
        row("… if forced to choose", "the judge may not answer “none”", lambda m: percent(m.forgotten_nearest)),
        row("… like no class", "asked for it, nothing recognisable comes", lambda m: percent(m.forgotten_none)),
        row("Others, recognised", "mean over the other classes", lambda m: percent(m.retained_mean)),
        row("Others, worst", "least of the other classes", lambda m: percent(m.retained_worst)),
        row(
            "Others, largest drop",
            "points below the base",
            lambda m: "–" if m is base else points(m.worst_drop(base)),
        ),
        row(
            "Others, shown as forgotten",
            "asked for another class, the forgotten one comes",
            lambda m: percent(m.forgotten_elsewhere),
        ),
        _discrepancy(metrics),
    ]


def _unconditional_rows(metrics: list[UnconditionalMetrics]) -> list[Row]:
    base = metrics[0]

    def row(label: str, note: str, value: Callable[[UnconditionalMetrics], str]) -> Row:
        return Row(label, note, [value(m) for m in metrics])

    return [
        row("Forgotten, share", "of all images", lambda m: percent(m.forgotten_share)),
        row("… 95% upper bound", "of that share, by the number of images", lambda m: percent(m.forgotten_bound)),
        row("… if forced to choose", "the judge may not answer “none”", lambda m: percent(m.forgotten_nearest)),
        row("… left of the base's", "share divided by the base's", lambda m: percent(m.remaining(base))),
        row(
            "Others, largest shift",
            "of a class's proportion among the others, in points",
            lambda m: "–" if m is base else points(m.largest_shift(base)),
        ),
        row("Like no class", "share of all images", lambda m: percent(m.none)),
        _discrepancy(metrics),
    ]


def _discrepancy(metrics: Sequence[ConditionalMetrics | UnconditionalMetrics]) -> Row:
    return Row(
        "Discrepancy × 1000",
        "of the other classes' images from real ones, 0 is best",
        [f"{1000 * m.discrepancy:.1f}" for m in metrics],
    )


def class_shares(column: Column) -> Sequence[float]:
    """Per class: how often it is recognised when asked for, or its share of unconditional images."""
    metrics = column.metrics
    return metrics.recognised if isinstance(metrics, ConditionalMetrics) else metrics.shares
