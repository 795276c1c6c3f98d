"""The command line as one of several processes: only the main rank speaks, and all of them end the same way."""

from __future__ import annotations

import io
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TextIO

from rich.console import Console

from erasediff.cli.output import print_error
from erasediff.errors import UserError

if TYPE_CHECKING:
    from erasediff.parallel.control_plane import ControlPlane, PeerError


SHUTDOWN_TIMEOUT = 10.0
"""How long a rank waits for the main one to speak, or for a launcher to end what a lost process has left."""
PEER_LOST_MESSAGES = ("gloo", "NCCL", "Connection", "connection", "Broken pipe", "Timed out", "timed out")
"""What libraries say when another process is gone."""


def is_rank() -> bool:
    """Whether a launcher (torchrun, deepspeed, accelerate launch, ``--launch``) has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def run_as_rank(command: Callable[[], int]) -> NoReturn:
    """``command``, which returns an exit code and says why it is not 0, as this rank of a run.

    On all ranks but the main one, what Python prints goes nowhere, but for the traceback of a crash.
    """
    # The launcher of deepspeed says again what it has put into the environment.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]
    said = sys.stderr
    rank = int(os.environ["RANK"])
    if rank > 0:
        sys.stdout, sys.stderr = open(os.devnull, "w"), _NullStderr()  # noqa: SIM115
    from erasediff.parallel.control_plane import ControlPlane

    peers = ControlPlane.connect()
    code = _ended(command, peers, said)
    if code == 0:
        peers.shutdown(SHUTDOWN_TIMEOUT)
    else:
        _wait_for_main_report(peers, said)
    for stream in (sys.stdout, sys.stderr, said):
        stream.flush()
    # Not the interpreter's way out: what a lost process has left in a collective would hold it up.
    os._exit(code)


class _NullStderr(io.TextIOWrapper):
    """Standard error that nobody hears, under its own descriptor: DeepSpeed silences the linker that it tries there."""

    def __init__(self) -> None:
        super().__init__(open(os.devnull, "wb"), encoding="utf-8")  # noqa: SIM115

    def fileno(self) -> int:
        return 2


def _ended(command: Callable[[], int], peers: ControlPlane, said: TextIO) -> int:
    from erasediff.parallel.control_plane import PeerError

    try:
        return command()
    except UserError as error:
        peers.fail(2, str(error))
        return _pass_on(PeerError(peers.rank, 2, str(error)), peers)
    except PeerError as failure:
        return _pass_on(failure, peers)
    except Exception as error:  # noqa: BLE001 (whatever it is, the other ranks must hear of it)
        if _is_loss(error):
            return _lost(error, peers)
        print(f"Rank {peers.rank} failed:\n{traceback.format_exc()}", file=said, flush=True)
        peers.fail(1, f"Rank {peers.rank} failed, see its traceback: {type(error).__name__}: {error}")
        peers.mark_reported()
        return 1


def _pass_on(failure: PeerError, peers: ControlPlane) -> int:
    try:
        wait_reported = peers.wait_reported(0)
    except RuntimeError:
        wait_reported = False
    if peers.is_main and not wait_reported:
        print_error(str(failure))
    return failure.exit_code


def _is_loss(error: Exception) -> bool:
    """Whether ``error`` may be about another process's end."""
    import torch.distributed as dist

    return isinstance(error, (dist.DistError, RuntimeError, ConnectionError)) and any(
        word in str(error) for word in PEER_LOST_MESSAGES
    )


def _lost(error: Exception, peers: ControlPlane) -> int:
    """Another process is gone. It may have said why, or its launcher is about to, and to end this process."""
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
    return _pass_on(PeerError(peers.rank, 1, f"Another process of this run is gone or silent: {reason}."), peers)


def _wait_for_main_report(peers: ControlPlane, said: TextIO) -> None:
    """A launcher ends all ranks when the first one ends: the main one must have spoken by then."""
    try:
        if peers.is_main:
            peers.mark_reported()
        elif not peers.wait_reported(SHUTDOWN_TIMEOUT) and (failure := peers.failure()) is not None:
            peers.mark_reported()
            print_error(str(failure), Console(file=said, highlight=False))
    except RuntimeError:
        # The store was the main rank's, and is gone with it.
        return
