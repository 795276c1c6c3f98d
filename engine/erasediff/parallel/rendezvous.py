"""Rendezvous of the ranks that a launcher has started: a key-value store that all of them have reached."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from erasediff.errors import UserError

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 5.0
"""Waiting for the others without a word."""
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rendezvous(seconds: float, notify: Callable[[str], None]) -> tuple[Store, int, int]:
    """Meet the other ranks by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them.

    Waits in Python, where Ctrl-C works, unlike in torch's own rendezvous.

    Args:
        seconds: Time that the ranks have.
        notify: Called with a sentence when the others are late, since the variables may be an ended run's.

    Returns:
        The store, this rank, and the number of ranks.

    Raises:
        UserError: A variable is missing or makes no sense, the port is taken, or the others do not come.
    """
    rank, size, host, port = _environment()
    late = (
        f"RANK={rank} and WORLD_SIZE={size} are set, so this process waits for the others at {host}:{port}; if "
        f"they are left from an earlier run, press Ctrl-C and unset {' '.join(VARIABLES)}."
    )
    waiting = _Waiting(seconds, lambda: notify(late), late)
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_server:
        waiting.until(lambda: _is_reachable(host, port))
    try:
        server = TCPStore(host, port, is_master=is_server, timeout=timedelta(seconds=seconds), wait_for_workers=False)
    except DistNetworkError as error:
        raise UserError(
            f"Rank {rank} cannot use {host}:{port} ({' '.join(str(error).split())[:100]}): choose another MASTER_PORT."
        ) from None
    # The agent of torchrun, which owns the store, starts ranks again after a failure.
    store = PrefixStore(f"erasediff/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
    store.set(f"met/{rank}", "done")
    waiting.until(lambda: store.check([f"met/{other}" for other in range(size)]))
    return store, rank, size


def _environment() -> tuple[int, int, str, int]:
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise UserError(f"{missing[0]} is not set beside RANK and WORLD_SIZE: use a launcher, or unset them.")
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        text = os.environ[name]
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise UserError(f"{name}={text} is no number: use a launcher, or unset {' '.join(VARIABLES)}.")
        numbers[name] = int(text)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={size}: use a launcher, or unset {' '.join(VARIABLES)}.")
    return rank, size, os.environ["MASTER_ADDR"], numbers["MASTER_PORT"]


class _Waiting:
    """Wait of all stages of a rendezvous together, with one sentence when it takes long."""

    def __init__(self, seconds: float, when_late: Callable[[], None], late: str) -> None:
        self._began = time.monotonic()
        self._seconds = seconds
        self._when_late: Callable[[], None] | None = when_late
        self._late = late

    def until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            waited = time.monotonic() - self._began
            if waited > self._seconds:
                raise UserError(f"Waited {self._seconds:g} s in vain: {self._late}")
            if waited > PATIENCE_SECONDS and self._when_late is not None:
                self._when_late()
                self._when_late = None
            time.sleep(POLL_SECONDS)


def _is_reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True
