"""Two streams: results on standard output, everything else on standard error."""

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any, ParamSpec

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from erasediff.runs import strict_json

P = ParamSpec("P")

messages = Console(stderr=True, highlight=False)
results = Console(highlight=False)


def loading(console: Console) -> Status:
    """A spinner while the heavy libraries are imported."""
    return console.status("Loading PyTorch and diffusers")


def print_error(sentence: str, console: Console = messages) -> None:
    """The one sentence that a mistake gets."""
    console.print(f"[bold red]Error:[/] {escape(sentence)}", soft_wrap=True)


def results_alone_on_stdout(command: Callable[P, None]) -> Callable[P, None]:
    """``command``, where whatever libraries print to standard output goes to standard error instead."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        results.file = sys.stdout
        with redirect_stdout(sys.stderr):
            command(*args, **kwargs)

    return run


def emit(result: Mapping[str, Any], *, as_json: bool, shown: RenderableType | None = None) -> None:
    """Print ``result``: one JSON object for machines, otherwise ``shown``, by default a table of its entries."""
    if as_json:
        print(strict_json.dumps(result, indent=2), file=results.file)
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
