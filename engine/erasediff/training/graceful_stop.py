"""Graceful stop: the first Ctrl-C or SIGTERM ends a run with a checkpoint, the second at once."""

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


class StopRequest:
    """The signal that asked for a stop, or None."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None


@contextmanager
def stop_on_signal(notify: Callable[[str], None]) -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM sets the request; the next raises KeyboardInterrupt.

    ``notify`` is called with what the person should know. Outside the main thread signals stay as they are.
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

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class AgreedStop:
    """The signal that any rank was sent, as all ranks see it after the same step.

    The ranks' answers are reduced on the host while the next step runs, so nothing waits for the device; a stop comes
    one step after the signal.
    """

    def __init__(self, signal_number: Callable[[], int | None]) -> None:
        self._signal_number = signal_number
        self._is_alone = World.current().size == 1
        self._pending: tuple[Tensor, dist.Work] | None = None

    def after_step(self) -> int | None:
        """The signal to stop for, or None. A collective."""
        if self._is_alone:
            return self._signal_number()
        agreed = self._finished()
        asked = torch.tensor(self._signal_number() or 0)
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = asked, work
        return agreed

    def close(self) -> None:
        """Take part in what is still under way."""
        self._finished()

    def _finished(self) -> int | None:
        if self._pending is None:
            return None
        asked, work = self._pending
        self._pending = None
        work.wait()
        return int(asked) or None
