"""Progress bars, on the console that the caller gives (the error stream's, so that output stays clean)."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column


class Bar:
    """One task of a progress display."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def extend(self, total: int) -> None:
        """Make ``total`` steps of it."""
        self._progress.update(self._task, total=total)

    def note(self, text: str) -> None:
        """Show ``text`` at the end of the bar."""
        self._progress.update(self._task, note=text)


@contextmanager
def progress_bar(console: Console, title: str, total: int, completed: int = 0) -> Iterator[Bar]:
    """Progress bar of ``total`` steps with the time left, and the time spent once it is full."""
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=completed, note=""))
