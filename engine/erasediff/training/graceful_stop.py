"""Graceful stop: the first Ctrl-C, SIGTERM or SIGHUP ends a run with a checkpoint, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from erasediff.parallel.world import World
from erasediff.utils.signals import stop_signals


class StopRequest:
    """Request to stop: the number of the signal, or None."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None


@contextmanager
def stop_on_signal(notify: Callable[[str], None]) -> Iterator[StopRequest]:
    """Stop gracefully on ``stop_signals`` within the block: the first sets the request, the next interrupts.

    ``notify`` is called with a message to the user; the second signal raises KeyboardInterrupt. Outside the main thread
    signals stay as they are.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if request:
            notify("Stopped at once; --resume latest continues from the last checkpoint.")
            raise KeyboardInterrupt
        request.signal_number = number
        notify("Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.")

    previous = {number: signal.signal(number, handle) for number in stop_signals()}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class AgreedStop:
    """Agreement of all ranks on the step at which to stop, after any of them was sent a signal.

    The ranks' answers are reduced on the host while the next step runs, so nothing waits for the device; a stop comes
    one step after the signal.
    """

    def __init__(self, signal_number: Callable[[], int | None]) -> None:
        self._signal_number = signal_number
        self._is_alone = World.current().size == 1
        self._pending: tuple[Tensor, dist.Work] | None = None

    def after_step(self) -> int | None:
        """Return the signal to stop for, or None. A collective."""
        if self._is_alone:
            return self._signal_number()
        agreed = self._finished()
        number = torch.tensor(self._signal_number() or 0)
        work = dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = number, work
        return agreed

    def close(self) -> None:
        """Complete a pending agreement."""
        self._finished()

    def _finished(self) -> int | None:
        if self._pending is None:
            return None
        number, work = self._pending
        self._pending = None
        work.wait()
        return int(number) or None
