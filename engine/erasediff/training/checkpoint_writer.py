"""Checkpoint writes in a background thread, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class CheckpointWriter:
    """Background writer of checkpoints, in a thread; at most one write is under way.

    A failed write is raised by the next call of any method, and at the latest when the ``with`` block ends. The block
    never ends before the last write has: not after an error either, which then carries a failed write as a note. No
    thread is left after it.

    Args:
        background: Use a thread; otherwise ``start`` runs the write itself. Ranks that agree on each write
            need that, since they must all do so at the same point of the run.
    """

    def __init__(self, *, background: bool = True) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._running: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Run ``write`` after the one under way has ended. Raises the error of that one."""
        self.wait()
        if self._executor is None:
            write()
        else:
            self._running = self._executor.submit(write)

    def check(self) -> None:
        """Raise the error of a write that has failed, without waiting for one under way."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Return once nothing is under way. Raises the error of a write that failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"The last checkpoint was not written either: {failure}")
        finally:
            if self._executor is not None:
                self._executor.shutdown()
