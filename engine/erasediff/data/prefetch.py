"""One-step-ahead loading of batches in a background thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Loads the batches of step ``n + 1`` while step ``n`` runs.

    Since batches are addressed by step, the result does not depend on what was loaded ahead: any step can be asked for
    at any time, and a step that was not foreseen is loaded on demand. One thread makes all calls, so ``load`` need not
    be thread-safe. Its tensors on a GPU are made on the stream that the caller was on. Use it as a context manager; no
    thread is left after the block.

    Args:
        load: the batches of a step, a function of the step alone.
        stop: the first step that is never asked for; None if that is not known.
    """

    def __init__(self, load: Callable[[int], T], *, stop: int | None = None) -> None:
        self._load = load
        self._stop = stop
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[T]] | None = None
        self._is_closed = False

    def at(self, step: int) -> T:
        """The batches of ``step``; those of the next one are then loaded in the background.

        Raises:
            ValueError: after the block.
            Exception: of any type, as ``load`` raised it for this step.
        """
        if self._is_closed:
            raise ValueError("the prefetcher is closed; ask for batches within its block")
        current = self._take(step)
        # Queued at once: the thread goes on to the next step without waiting for this one to be picked up.
        if self._stop is None or step + 1 < self._stop:
            self._next = step + 1, self._submit(step + 1)
        return current.result()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_closed = True
        self._next = None
        self._executor.shutdown(cancel_futures=True)

    def _take(self, step: int) -> Future[T]:
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == step:
            return ahead[1]
        if ahead is not None:
            ahead[1].cancel()
        return self._submit(step)

    def _submit(self, step: int) -> Future[T]:
        # Streams are a thread's own: without this, a batch could be read on another stream before it is there.
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        return self._executor.submit(self._on_stream, stream, step)

    def _on_stream(self, stream: torch.cuda.Stream | None, step: int) -> T:
        with torch.cuda.stream(stream):
            return self._load(step)
