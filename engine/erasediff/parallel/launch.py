"""Launcher of one process per rank on this machine, each running this command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, start_processes
from torch.distributed.elastic.multiprocessing import api as elastic

from erasediff.errors import UserError
from erasediff.utils.signals import stop_signals

HOST = "127.0.0.1"


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``erasediff`` in one process per rank on this machine.

    Signals go on to all ranks. The first rank to fail ends the others.

    Args:
        arguments: Command line of every rank.
        processes: Number of ranks.

    Returns:
        Exit code of the first rank that failed, or 0.

    Raises:
        UserError: A rank was killed by a signal, so that it could not report its own end.
    """
    elastic.logger.setLevel("CRITICAL")
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    command = (sys.executable, "-m", "erasediff.cli", *arguments)
    ranks = start_processes(
        name="erasediff",
        entrypoint=command[0],
        args=dict.fromkeys(range(processes), command[1:]),
        envs={rank: _environment(rank, processes, store.port) for rank in range(processes)},
        logs_specs=DefaultLogsSpecs(),
        start_method="spawn",
    )
    try:
        with _signals_passed_on(ranks):
            result = ranks.wait()
    finally:
        ranks.close(signal.SIGKILL)
    if result is None or not result.is_failed():
        return 0
    rank, first = min(result.failures.items(), key=lambda failed: failed[1].timestamp)
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        raise UserError(f"Rank {rank} was killed ({name}); --resume latest continues from the last checkpoint.")
    return first.exitcode


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Environment of a rank, as torchrun sets it; the store is this process's, so that it outlives each of them."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


@contextmanager
def _signals_passed_on(ranks: PContext) -> Iterator[None]:
    """Forward signals to stop to the ranks, which are in sessions of their own, instead of ending this process."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for process in ranks.pids().values():
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue

    previous = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
