"""Ranks of one run as forked processes, to be killed, stopped or cut off: what starts them takes no time of its own.

The test's process keeps their key-value store and ends the others when one is killed, as ``--launch`` does.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from crash_points import SECONDS, start
from forked import Forked
from placing import environment
from torch.distributed import TCPStore

CUT_SIGNAL = signal.SIGUSR1
RANK_COMMAND = "forked_ranks:cuttable"


class Ranks:
    """``erasediff`` with ``words`` on two ranks.

    Args:
        words: The command line.
        root: Folder that it writes to.
        fatal: The call that ends each rank, or finds a full disk; 0 for none. See ``crash_points.start``.
        proxy: Stands between the second rank and the store.
        variables: Environment.
    """

    def __init__(
        self,
        words: Sequence[str],
        root: Path,
        fatal: Sequence[int] = (0, 0),
        proxy: Proxy | None = None,
        **variables: str,
    ) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **environment(2), **variables}
        shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        if proxy is not None:
            proxy.target = self.store.port
        self.processes: list[Forked] = []
        for rank in range(2):
            port = proxy.port if proxy is not None and rank == 1 else self.store.port
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            self.processes.append(
                start([RANK_COMMAND, *words], root, fatal[rank], trace=f"rank {rank}", **shared, **own)
            )

    def wait_for_one(self, seconds: float = SECONDS) -> None:
        """Wait until one has ended."""
        deadline = time.monotonic() + seconds
        while all(process.poll() is None for process in self.processes):
            assert time.monotonic() < deadline, "no rank has ended"
            time.sleep(0.02)

    def finish(self, seconds: float = SECONDS) -> list[tuple[int | None, str]]:
        """Exit code and standard error of each rank; ends those that have not ended after ``seconds``."""
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.end()

    def end(self) -> list[tuple[int | None, str]]:
        """End those that have not ended, as a launcher does, and return the exit codes and standard errors."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        return [(process.returncode, errors) for process in self.processes for errors in [process.communicate()[1]]]


def cuttable(words: list[str]) -> None:
    """The command line, whose connections to other ranks end at ``CUT_SIGNAL``, those to the store apart."""
    from forked import erasediff

    def cut(_number: int, _frame: object) -> None:
        store = int(os.environ["MASTER_PORT"])
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(OSError, ValueError):
                if not os.readlink(entry).startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(entry.name))) as peer:
                    if peer.family in (socket.AF_INET, socket.AF_INET6) and peer.getpeername()[1] != store:
                        peer.shutdown(socket.SHUT_RDWR)

    signal.signal(CUT_SIGNAL, cut)
    erasediff(words)


class Proxy:
    """A port that forwards to the port ``target`` until it is frozen: connections stay, and say no more."""

    def __init__(self) -> None:
        self.target = 0
        self.is_frozen = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._sockets = [self._server]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                ours, _ = self._server.accept()
                theirs = socket.create_connection(("127.0.0.1", self.target))
                self._sockets += [ours, theirs]
                for pair in ((ours, theirs), (theirs, ours)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self.is_frozen.is_set():
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for one in self._sockets:
            with suppress(OSError):
                one.close()
