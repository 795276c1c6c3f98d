"""Control plane of a distributed run: order, small objects and failures, exchanged through a key-value store.

The store is the one that the process group begins with, so this works before there is a group, waits as long as it
must, and still works when a collective cannot.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch.distributed import Store  # type: ignore[attr-defined]

from erasediff.errors import UserError
from erasediff.parallel.rendezvous import rendezvous

RENDEZVOUS_SECONDS = 600.0
POLL_SECONDS = 0.05
FAILED, REPORTED = "failed", "told"


class PeerError(Exception):
    """Another rank has ended the run; ``exit_code`` and the message are its own."""

    def __init__(self, rank: int, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code


class ControlPlane:
    """Key-value exchange among the ranks of a run. All of them must call the same methods in the same order.

    A process is one rank of one run at a time: ``current`` is that run's from ``connect`` to ``shutdown``, and before
    and after it a single process without a store.
    """

    _current: ClassVar[ControlPlane | None] = None

    def __init__(self, store: Store | None = None, rank: int = 0, size: int = 1) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.seconds = RENDEZVOUS_SECONDS
        self._count = 0

    @classmethod
    def current(cls) -> ControlPlane:
        """The connected control plane; that of a single process before ``connect``."""
        if cls._current is None:
            cls._current = cls()
        return cls._current

    @classmethod
    def connect(cls, notify: Callable[[str], None] = lambda _: None) -> ControlPlane:
        """Meet the ranks that a launcher has started: see ``rendezvous``."""
        cls._current = cls(*rendezvous(RENDEZVOUS_SECONDS, notify))
        return cls._current

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def exchange(self, value: Any, *, patient: bool = False) -> list[Any]:
        """Every rank's ``value`` (of JSON), by rank.

        Args:
            value: This rank's.
            patient: Wait for the others however long they take.

        Raises:
            PeerError: Another rank has ended the run.
            UserError: One stays away too long.
        """
        if self.store is None:
            return [value]
        self._count += 1
        self.store.set(f"{self._count}/{self.rank}", json.dumps(value))
        return [
            json.loads(self._get(f"{self._count}/{rank}", None if patient else self.seconds))
            for rank in range(self.size)
        ]

    def broadcast_object(self, value: Any) -> Any:
        """The main rank's ``value`` (of JSON)."""
        return self.exchange(value)[0]

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The main rank goes through the block alone, however long it takes, and then the others at once."""
        self._count += 1
        key = f"{self._count}/main"
        if not self.is_main:
            self._get(key, None)
        yield
        if self.store is not None and self.is_main:
            self.store.set(key, "done")

    def fail(self, exit_code: int, message: str) -> None:
        """Record why this rank ends the run; the first record counts."""
        if self.store is not None and not self.store.check([FAILED]):
            self.store.set(FAILED, json.dumps([self.rank, exit_code, message]))

    def failure(self) -> PeerError | None:
        """The failure that has ended the run, if one has."""
        if self.store is None or not self.store.check([FAILED]):
            return None
        return PeerError(*json.loads(self.store.get(FAILED)))

    def mark_reported(self) -> None:
        """Record that the main rank has reported how the run ends: the others may exit."""
        if self.store is not None:
            self.store.set(REPORTED, "done")

    def wait_reported(self, seconds: float) -> bool:
        """Whether the end of the run has been reported, within ``seconds``."""
        deadline = time.monotonic() + seconds
        while self.store is not None and not self.store.check([REPORTED]):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def shutdown(self, seconds: float) -> None:
        """Leave the run, the main rank last, after ``seconds`` at most: the store may end with its process."""
        if self.store is None:
            return
        self.store.set(f"left/{self.rank}", "done")
        deadline = time.monotonic() + seconds
        everyone = [f"left/{rank}" for rank in range(self.size)]
        while self.is_main and not self.store.check(everyone) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if ControlPlane._current is self:
            ControlPlane._current = None

    def _get(self, key: str, seconds: float | None) -> bytes:
        assert self.store is not None
        began = time.monotonic()
        while not self.store.check([key]):
            if (failure := self.failure()) is not None:
                raise failure
            if seconds is not None and time.monotonic() - began > seconds:
                raise UserError(
                    f"Rank {self.rank} waited {seconds:g} s for another process in vain: see what became of it, or "
                    "raise distributed.timeout."
                )
            time.sleep(POLL_SECONDS)
        content: bytes = self.store.get(key)
        return content
