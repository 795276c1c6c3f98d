"""Contents to HTML."""

from typing import Any

from erasediff.evaluation import ConditionalMetrics, UnconditionalMetrics
from erasediff.evaluation.targets import Target, conditional_targets, unconditional_targets
from erasediff.report.contents import Column, Contents
from erasediff.report.curves import QUANTITIES, curve, recorded
from erasediff.report.pictures import strip
from erasediff.report.table import class_shares, metric_rows, percent, points
from erasediff.report.templates import template_environment

PICTURE_COLUMNS = 10


def render(contents: Contents) -> str:
    """The report as one HTML page that needs nothing else: no network, no script, no other file."""
    environment = template_environment()
    environment.filters |= {"percent": percent, "points": points}
    return environment.get_template("report.html.j2").render(
        contents=contents,
        conditional=isinstance(contents.base.metrics, ConditionalMetrics),
        forgotten=_listed([contents.class_names[c] for c in contents.forget]),
        targets=_targets(contents),
        pictures=[_picture(column, len(contents.class_names)) for column in contents.columns],
        curves=_curves(contents),
        rows=metric_rows(contents),
        shares=[class_shares(column) for column in contents.columns],
    )


def _targets(contents: Contents) -> tuple[Target, ...]:
    base, unlearned = contents.base.metrics, contents.unlearned.metrics
    if isinstance(base, ConditionalMetrics) and isinstance(unlearned, ConditionalMetrics):
        return conditional_targets(unlearned, base)
    if isinstance(base, UnconditionalMetrics) and isinstance(unlearned, UnconditionalMetrics):
        return unconditional_targets(unlearned, base)
    raise ValueError("a report compares conditional models or unconditional ones, not both")


def _picture(column: Column, num_classes: int) -> list[str]:
    """One strip per class."""
    return [strip(column.images[column.rows == c], PICTURE_COLUMNS) for c in range(num_classes)]


def _curves(contents: Contents) -> list[dict[str, Any]]:
    compared = contents.columns[1:]
    return [
        {
            "title": QUANTITIES[quantity],
            "titles": [column.title for column in columns],
            "light": curve(compared, quantity, dark=False),
            "dark": curve(compared, quantity, dark=True),
        }
        for quantity, columns in recorded(compared).items()
    ]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
