"""Command line of one rank among several: only the main rank prints, and all ranks end with the same exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TextIO

from rich.console import Console

from erasediff.cli.crash import as_user_error, log_crash
from erasediff.cli.output import print_error
from erasediff.errors import RunFailedError, UserError

if TYPE_CHECKING:
    from erasediff.parallel.control_plane import ControlPlane, PeerError


SHUTDOWN_TIMEOUT = 10.0
"""Seconds that a rank waits for the main one's report, or for a launcher to end what a lost process has left."""
HEARTBEAT_SECONDS = 0.5
"""Between two signs of life of a rank."""
SILENCE_SECONDS = 5.0
"""Without a sign of life, after which a process counts as gone."""


def is_rank() -> bool:
    """Whether a launcher (torchrun, deepspeed, accelerate launch, ``--launch``) has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def run_as_rank(command: Callable[[], int]) -> NoReturn:
    """``command``, which returns an exit code and says why it is not 0, as this rank of a run.

    On all ranks but the main one, what Python prints goes nowhere.
    """
    # The launcher of deepspeed says again what it has put into the environment.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]
    stderr = sys.stderr
    if os.environ["RANK"] != "0":
        sys.stdout, sys.stderr = open(os.devnull, "w"), _NullStderr()  # noqa: SIM115
    from erasediff.parallel.control_plane import ControlPlane

    try:
        peers = ControlPlane.connect(lambda sentence: print(sentence, file=stderr, flush=True))
    except UserError as error:
        print_error(str(error), Console(file=stderr, highlight=False))
        _exit(error.exit_code, stderr)
    except KeyboardInterrupt:
        _exit(128 + signal.SIGINT, stderr)
    code = _run(command, peers, Heartbeat(peers))
    if code == 0:
        peers.shutdown(SHUTDOWN_TIMEOUT)
    else:
        _wait_for_main_report(peers, stderr)
    _exit(code, stderr)


def _exit(code: int, stderr: TextIO) -> NoReturn:
    """End this process; the interpreter's own way out would wait for what a lost process left in a collective."""
    for stream in (sys.stdout, sys.stderr, stderr):
        stream.flush()
    os._exit(code)


class _NullStderr(io.TextIOWrapper):
    """Standard error that nobody hears, under its own descriptor: DeepSpeed silences the linker that it tries there."""

    def __init__(self) -> None:
        super().__init__(open(os.devnull, "wb"), encoding="utf-8")  # noqa: SIM115

    def fileno(self) -> int:
        return 2


class Heartbeat:
    """Signs of life of all ranks, in the key-value store of the control plane.

    Libraries raise plain ``RuntimeError`` when a peer is gone (gloo) as for anything else that goes wrong, so an error
    alone does not tell whether it is this rank's fault. A rank that is alive renews its key even while it waits in a
    collective; one that was killed or stopped does not.
    """

    def __init__(self, peers: ControlPlane) -> None:
        assert peers.store is not None
        self.peers = peers
        # Over a connection of its own: the other one may be waiting for a key.
        self.store = peers.store.clone()
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def _beat(self) -> None:
        while True:
            try:
                self.store.add(f"alive/{self.peers.rank}", 1)
            except RuntimeError:
                # The store is gone, and its process with it: whoever asks finds out.
                return
            time.sleep(HEARTBEAT_SECONDS)

    def lost(self) -> bool:
        """Whether another rank, or the process of the store, is gone; takes up to ``SILENCE_SECONDS``."""
        others = {rank for rank in range(self.peers.size) if rank != self.peers.rank}
        store = self.store.clone()
        try:
            before = {rank: store.add(f"alive/{rank}", 0) for rank in others}
            deadline = time.monotonic() + SILENCE_SECONDS
            while others and time.monotonic() < deadline:
                time.sleep(HEARTBEAT_SECONDS)
                others = {rank for rank in others if store.add(f"alive/{rank}", 0) == before[rank]}
                others = {rank for rank in others if not store.check([f"left/{rank}"])}
                if self.peers.failure() is not None:
                    return True
        except RuntimeError:
            return True
        return bool(others)


def _run(command: Callable[[], int], peers: ControlPlane, heartbeat: Heartbeat) -> int:
    from erasediff.parallel.control_plane import PeerError

    try:
        return command()
    except (UserError, RunFailedError) as error:
        peers.fail(error.exit_code, str(error))
        return _pass_on(PeerError(peers.rank, error.exit_code, str(error)), peers)
    except PeerError as failure:
        return _pass_on(failure, peers)
    except Exception as error:  # noqa: BLE001 (whatever it is, the other ranks must hear of it)
        if heartbeat.lost():
            return _lost(error, peers)
        known = as_user_error(error)
        sentence = log_crash(error, peers.rank) if known is None else str(known)
        crash = PeerError(peers.rank, 1 if known is None else known.exit_code, sentence)
        peers.fail(crash.exit_code, sentence)
        return _pass_on(crash, peers)


def _pass_on(failure: PeerError, peers: ControlPlane) -> int:
    """The exit code of ``failure``, which the main rank prints unless it was printed already."""
    try:
        wait_reported = peers.wait_reported(0)
    except RuntimeError:
        wait_reported = False
    if peers.is_main and not wait_reported:
        print_error(str(failure))
    return failure.exit_code


def _lost(error: Exception, peers: ControlPlane) -> int:
    """Another process is gone. It may have stderr why, or its launcher is about to, and to end this process."""
    from erasediff.parallel.control_plane import PeerError

    deadline = time.monotonic() + SHUTDOWN_TIMEOUT
    while time.monotonic() < deadline:
        try:
            failure = peers.failure()
        except RuntimeError:
            break
        if failure is not None:
            return _pass_on(failure, peers)
        time.sleep(0.2)
    reason = " ".join(str(error).split())[:200]
    return _pass_on(PeerError(peers.rank, 1, f"Another process of this run is gone: {reason}."), peers)


def _wait_for_main_report(peers: ControlPlane, stderr: TextIO) -> None:
    """A launcher ends all ranks when the first one ends: the main one must have spoken by then."""
    try:
        if peers.is_main:
            peers.mark_reported()
        elif not peers.wait_reported(SHUTDOWN_TIMEOUT) and (failure := peers.failure()) is not None:
            peers.mark_reported()
            print_error(str(failure), Console(file=stderr, highlight=False))
    except RuntimeError:
        # The store was the main rank's, and is gone with it.
        return
