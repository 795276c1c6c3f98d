"""Progress bars, on whichever console the caller gives: the error stream's, so that output stays clean."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """Moves one progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        """Show ``text`` at the end of the bar."""
        self._progress.update(self._task, note=text)


@contextmanager
def progress_bar(console: Console, title: str, total: int, completed: int = 0) -> Iterator[Bar]:
    """A bar of ``total`` steps, with the time spent and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=completed, note=""))
