"""Ctrl-C where there is nothing to save: one line, and the exit code that shells expect."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGINT


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Exit with ``EXIT_CODE`` and one line where SIGINT arrives within the block, except where a run handles it.

    Libraries turn an interrupt while they are imported into other errors: those count as interrupts too.
    """
    is_main = threading.current_thread() is threading.main_thread()
    arrived = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal arrived
        arrived = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt) if is_main else None
    try:
        yield
    except KeyboardInterrupt:
        arrived = True
        raise SystemExit(_say()) from None
    except Exception:
        if arrived:
            raise SystemExit(_say()) from None
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _say() -> int:
    print("Interrupted.", file=sys.stderr, flush=True)
    return EXIT_CODE
