"""Contents of a report: models, metrics, images, settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from erasediff.evaluation import ConditionalMetrics, UnconditionalMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Column of the report: one model.

    Attributes:
        title: Title, as in "EraseDiff".
        summary: What was done to it, in a few words.
        metrics: Metrics, of one kind in all columns.
        images: [N, C, H, W] in [-1, 1], from the same seed in all columns.
        rows: int64 [N], the row of the picture that each image belongs to: the class asked for, or the class of an
            unconditional image (no class: negative).
        records: Records of each step, as in metrics.jsonl; empty where the report shows no curve.
    """

    title: str
    summary: str
    metrics: ConditionalMetrics | UnconditionalMetrics
    images: Tensor
    rows: Tensor
    records: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Contents of one report.

    Attributes:
        columns: The base, the unlearned model, and then the controls.
        class_names: Names by class number.
        judge_accuracy: Accuracy of the classifier on held-out real images, in [0, 1].
        command: Command that repeats the run.
        settings: The run's configuration, as YAML.
        versions: Versions of libraries, by name.
    """

    columns: Sequence[Column]
    class_names: Sequence[str]
    judge_accuracy: float
    command: str
    settings: str
    versions: Mapping[str, str]

    @property
    def base(self) -> Column:
        return self.columns[0]

    @property
    def unlearned(self) -> Column:
        return self.columns[1]

    @property
    def forget(self) -> tuple[int, ...]:
        return self.unlearned.metrics.forget


class Row(NamedTuple):
    """Row of the metrics table; ``note`` explains the number to a newcomer."""

    label: str
    note: str
    values: Sequence[str]


def percent(share: float) -> str:
    return "–" if share != share else f"{100 * share:.1f}%"


def points(share: float) -> str:
    """Format a difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def metric_rows(contents: Contents) -> list[Row]:
    """Rows of metrics for the kind of model in the report."""
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
        row(
            "Unlearning accuracy (UA)",
            "asked for the forgotten class, the classifier sees another one or none",
            lambda m: percent(1 - m.forgotten_rate),
        ),
        row("… 95% lower bound", "Wilson interval for the number of images", lambda m: percent(1 - m.forgotten_bound)),
        row("… without “none”", "the classifier has to choose a class", lambda m: percent(1 - m.forgotten_nearest)),
        row("… no class", "share of these images that resemble no class", lambda m: percent(m.forgotten_none)),
        row("Retain accuracy (RA)", "mean over the retained classes", lambda m: percent(m.retained_mean)),
        row("… worst class", "lowest of the retained classes", lambda m: percent(m.retained_worst)),
        row(
            "… largest drop",
            "of a class, in percentage points below the base",
            lambda m: "–" if m is base else points(m.worst_drop(base)),
        ),
        row(
            "Retained, seen as forgotten",
            "asked for a retained class, the classifier sees the forgotten one",
            lambda m: percent(m.forgotten_elsewhere),
        ),
        _discrepancy(metrics),
    ]


def _unconditional_rows(metrics: list[UnconditionalMetrics]) -> list[Row]:
    base = metrics[0]

    def row(label: str, note: str, value: Callable[[UnconditionalMetrics], str]) -> Row:
        return Row(label, note, [value(m) for m in metrics])

    return [
        row("Forgotten class, share", "of all images, by the classifier", lambda m: percent(m.forgotten_share)),
        row("… 95% upper bound", "Wilson interval for the number of images", lambda m: percent(m.forgotten_bound)),
        row("… without “none”", "the classifier has to choose a class", lambda m: percent(m.forgotten_nearest)),
        row("… relative to the base", "share divided by the base's", lambda m: percent(m.remaining(base))),
        row(
            "Retained, largest shift",
            "of a class's proportion among the retained ones, in percentage points",
            lambda m: "–" if m is base else points(m.largest_shift(base)),
        ),
        row("No class", "share of images that resemble no class", lambda m: percent(m.none)),
        _discrepancy(metrics),
    ]


def _discrepancy(metrics: Sequence[ConditionalMetrics | UnconditionalMetrics]) -> Row:
    return Row(
        "MMD² × 1000",
        "distance of the retained classes' images from real ones, 0 is best",
        [f"{1000 * m.discrepancy:.1f}" for m in metrics],
    )


def class_shares(column: Column) -> Sequence[float]:
    """Accuracy of each class, or its share of unconditional images."""
    metrics = column.metrics
    return metrics.recognised if isinstance(metrics, ConditionalMetrics) else metrics.shares
