"""Two streams: results on standard output, everything else on standard error."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, ParamSpec

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from erasediff.cli.interrupts import exit_on_interrupt
from erasediff.io import jsonl

if TYPE_CHECKING:
    from erasediff.evaluation import ConditionalMetrics, UnconditionalMetrics
    from erasediff.workflows.evaluate import Metrics


P = ParamSpec("P")

messages = Console(stderr=True, highlight=False)
results = Console(highlight=False)


def loading(console: Console) -> Status:
    """A spinner while the heavy libraries are imported."""
    return console.status("Loading PyTorch and diffusers")


def print_error(sentence: str, console: Console = messages) -> None:
    """The one sentence that a mistake gets, in one line: a name in it may hold what a terminal obeys."""
    line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in sentence)
    console.print(f"[bold red]Error:[/] {escape(line)}", soft_wrap=True)


def results_alone_on_stdout(command: Callable[P, None]) -> Callable[P, None]:
    """``command``, where what libraries print to standard output goes to standard error, and Ctrl-C is one line."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        results.file = sys.stdout
        with redirect_stdout(sys.stderr), exit_on_interrupt():
            command(*args, **kwargs)

    return run


def emit(result: Mapping[str, Any], *, as_json: bool, shown: RenderableType | None = None) -> None:
    """Print ``result``: one JSON object for machines, otherwise ``shown``, by default a table of its entries."""
    if as_json:
        print(jsonl.dumps(result, indent=2), file=results.file)
    else:
        results.print(shown if shown is not None else as_table(result))


def as_table(result: Mapping[str, Any]) -> Table:
    """Names and values in two columns; a name ending in ``_bytes`` or ``seconds`` tells its value's unit."""
    table = Table.grid(padding=(0, 2))
    for name, value in result.items():
        table.add_row(f"[bold]{readable_name(name)}[/]", escape(readable(name, value)))
    return table


def readable_name(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def readable(name: str, value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() if name.endswith("_bytes"):
            return f"{value / 2**20:,.1f} MiB"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(readable("", item) for item in value) or "none"
        case Mapping():
            return "  ".join(f"{key} {readable(key, item)}" for key, item in value.items())
    return str(value)


def metrics_table(columns: Mapping[str, Metrics]) -> Table:
    """One column per model, all of them of the same kind; a row per class, then the totals."""
    from erasediff.evaluation import ConditionalMetrics, UnconditionalMetrics

    every = list(columns.values())
    conditional = [metrics for metrics in every if isinstance(metrics, ConditionalMetrics)]
    unconditional = [metrics for metrics in every if isinstance(metrics, UnconditionalMetrics)]
    table = Table("Classified as the class asked for" if conditional else "Share of all images", *columns)
    for name, values in _conditional_rows(conditional) if conditional else _unconditional_rows(unconditional):
        table.add_row(name, *values)
    return table


def plans_table(plans: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column per plan (see ``erasediff.workflows.dry_run.DryRun``)."""
    table = Table("", *plans)
    for name in next(iter(plans.values())):
        table.add_row(readable_name(name), *(readable(name, plan[name]) for plan in plans.values()))
    return table


def _conditional_rows(columns: Sequence[ConditionalMetrics]) -> list[tuple[str, list[str]]]:
    base = columns[0]
    return [
        *_class_rows([metrics.recognised for metrics in columns], base.forget),
        ("UA (unlearning accuracy)", [f"{1 - metrics.forgotten_rate:.2%}" for metrics in columns]),
        ("UA, 95% lower bound", [f"{1 - metrics.forgotten_bound:.2%}" for metrics in columns]),
        ("forgotten, no class", [f"{metrics.forgotten_none:.1%}" for metrics in columns]),
        ("RA (retain accuracy)", [f"{metrics.retained_mean:.1%}" for metrics in columns]),
        ("RA, worst class", [f"{metrics.retained_worst:.1%}" for metrics in columns]),
        ("RA, largest drop", [f"{metrics.worst_drop(base):.1%}" for metrics in columns]),
        ("MMD^2 x 1000", [f"{1000 * metrics.discrepancy:.2f}" for metrics in columns]),
    ]


def _unconditional_rows(columns: Sequence[UnconditionalMetrics]) -> list[tuple[str, list[str]]]:
    base = columns[0]
    return [
        *_class_rows([metrics.shares for metrics in columns], base.forget),
        ("no class", [f"{metrics.none:.1%}" for metrics in columns]),
        ("forgotten, 95% bound", [f"{metrics.forgotten_bound:.2%}" for metrics in columns]),
        ("forgotten, share of base's", [f"{metrics.remaining(base):.1%}" for metrics in columns]),
        ("retained, largest shift", [f"{metrics.largest_shift(base):.1%}" for metrics in columns]),
        ("MMD^2 x 1000", [f"{1000 * metrics.discrepancy:.2f}" for metrics in columns]),
    ]


def _class_rows(shares: Sequence[Sequence[float]], forget: Sequence[int]) -> list[tuple[str, list[str]]]:
    """Per class, its share in each column."""
    return [
        (f"class {number}{' (forgotten)' if number in forget else ''}", [f"{share:.1%}" for share in of_class])
        for number, of_class in enumerate(zip(*shares, strict=True))
    ]
