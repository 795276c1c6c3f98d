"""Command line of one rank among several: only the main rank prints, and all ranks end with the same exit code."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
AFTER_SILENCE_SECONDS = 2.0
"""In which a launcher may still say what became of a process that gave no sign of life all that time."""
RESUME = "--resume latest continues from the last checkpoint"
# "[/path/to/gloo/pair.cc:123] " at the head of gloo's messages.
_SOURCE_PLACE = re.compile(r"\[\S+\.(?:cc|cpp|h):\d+\] *")


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
    code = _run(command, peers, Heartbeat(peers, lambda sentence: _end_at_once(sentence, stderr)), stderr)
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


def _end_at_once(sentence: str, stderr: TextIO) -> NoReturn:
    """End this process from another thread than that of the command, which waits for what will not come."""
    print_error(sentence, Console(file=stderr, highlight=False))
    _exit(1, stderr)


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

    Args:
        peers: The ranks.
        when_cut_off: Called in a thread, with a sentence, when the store has not answered for ``peers.seconds`` within
            ``watched``: a store's answer is waited for without end, where a network drops it.
    """

    def __init__(self, peers: ControlPlane, when_cut_off: Callable[[str], None] = lambda _: None) -> None:
        assert peers.store is not None
        self.peers = peers
        self._when_cut_off = when_cut_off
        self._is_watched = False
        self._beats = 0
        # Over a connection of its own: the other one may be waiting for a key.
        self.store = peers.store.clone()
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()
        threading.Thread(target=self._watch, daemon=True, name="heartbeat-watch").start()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the store within the block."""
        self._is_watched = True
        try:
            yield
        finally:
            self._is_watched = False

    def _beat(self) -> None:
        while True:
            try:
                self.store.add(f"alive/{self.peers.rank}", 1)
            except RuntimeError:
                # The store is gone, and its process with it: whoever asks finds out.
                return
            self._beats += 1
            time.sleep(HEARTBEAT_SECONDS)

    def _watch(self) -> None:
        # Counted in turns of this thread, since a clock goes on while the process is suspended.
        seen, silence = -1, 0.0
        while silence <= self.peers.seconds:
            time.sleep(HEARTBEAT_SECONDS)
            silence = 0.0 if self._beats != seen or not self._is_watched else silence + HEARTBEAT_SECONDS
            seen = self._beats
        self._when_cut_off(
            f"Rank {self.peers.rank} has had no answer from the key-value store of this run for {self.peers.seconds:g} "
            f"s: see the network and the first process; {RESUME}."
        )

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


def _run(command: Callable[[], int], peers: ControlPlane, heartbeat: Heartbeat, stderr: TextIO) -> int:
    from erasediff.parallel.control_plane import PeerError

    try:
        with heartbeat.watched():
            return command()
    except (UserError, RunFailedError) as error:
        peers.fail(error.exit_code, str(error))
        return _pass_on(PeerError(peers.rank, error.exit_code, str(error)), peers)
    except PeerError as failure:
        return _pass_on(failure, peers)
    except Exception as error:  # noqa: BLE001 (whatever it is, the other ranks must hear of it)
        if heartbeat.lost():
            return _lost(error, peers, stderr, AFTER_SILENCE_SECONDS)
        if _is_broken_connection(error):
            return _lost(error, peers, stderr, SHUTDOWN_TIMEOUT)
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


def _is_broken_connection(error: Exception) -> bool:
    """Whether a collective failed for its connections: gloo names its own source, NCCL and the store have classes."""
    from torch.distributed import DistBackendError, DistNetworkError

    return isinstance(error, DistBackendError | DistNetworkError) or "/gloo/" in str(error)


def _lost(error: Exception, peers: ControlPlane, stderr: TextIO, seconds: float) -> int:
    """Another process is gone or cannot be reached. It may say why in ``seconds``, or its launcher."""
    from erasediff.parallel.control_plane import PeerError

    reason = _SOURCE_PLACE.sub("", " ".join(str(error).split()))[:200].rstrip(". ")
    sentence = f"Rank {peers.rank} has lost another process of this run ({reason}): see whether it runs; {RESUME}."
    try:
        deadline = time.monotonic() + seconds
        while (failure := peers.failure()) is None and time.monotonic() < deadline:
            time.sleep(0.2)
        if failure is None:
            peers.fail(1, sentence)
            failure = PeerError(peers.rank, 1, sentence)
    except RuntimeError:
        # The store is gone as well: nobody else hears it.
        print_error(sentence, Console(file=stderr, highlight=False))
        return 1
    return _pass_on(failure, peers)


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
