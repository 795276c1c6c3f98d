"""A rank that ends with an error: its own traceback, unless another process is really gone."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from erasediff.cli import worker
from erasediff.cli.worker import Heartbeat
from erasediff.parallel.control_plane import ControlPlane


def test_an_error_that_speaks_of_connections_keeps_its_traceback(tmp_path: Path) -> None:
    """Errors such as a failed download: only a lost process makes an error another rank's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = """
from erasediff.cli.worker import run_as_rank
def command():
    raise RuntimeError("Connection reset by the hub: timed out")
run_as_rank(command)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **rank, "ERASEDIFF_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "(RuntimeError: Connection reset by the hub: timed out); the traceback is in" in ended.stderr
    assert "Traceback" in (tmp_path / "crash.log").read_text()
    assert "another process" not in ended.stderr.lower()


def test_a_collective_whose_connection_broke_is_no_fault_of_the_program(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = """
from erasediff.cli import worker
worker.SHUTDOWN_TIMEOUT = 0.1
def command():
    raise RuntimeError("[/src/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:80")
worker.run_as_rank(command)
"""
    variables = {**os.environ, **rank, "ERASEDIFF_CACHE": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == (
        "Error: Rank 0 has lost another process of this run (Connection closed by peer [127.0.0.1]:80): see whether it "
        "runs; --resume latest continues from the last checkpoint.\n"
    )
    assert not (tmp_path / "crash.log").exists()


class SilentStore:
    """A store whose answers a network drops."""

    def __init__(self) -> None:
        self.answers = threading.Event()

    def clone(self) -> SilentStore:
        return self

    def add(self, key: str, amount: int) -> int:
        self.answers.wait()
        return amount


def test_a_store_that_answers_no_more_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.02)
    store: Any = SilentStore()
    peers = ControlPlane(store, 1, 2)
    peers.seconds = 0.1
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    with Heartbeat(peers, said.put).watched():
        assert said.get(timeout=30).startswith("Rank 1 has had no answer from the key-value store")
    store.answers.set()


def test_a_run_that_failed_ends_every_rank_with_its_code_and_one_sentence() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    command = """
from erasediff.cli.worker import run_as_rank
from erasediff.errors import RunFailedError
def command():
    raise RunFailedError("Nothing was learned.")
run_as_rank(command)
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", command],
            env={**os.environ, **shared, "RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [3, 3]
    assert "".join(said).strip() == "Error: Nothing was learned."


def test_a_process_is_lost_when_its_heartbeat_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(worker, "SILENCE_SECONDS", 0.3)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second, silent = (
        Heartbeat(ControlPlane(store, rank, size)) if rank < 2 else ControlPlane(store, rank, size)
        for rank, size in ((0, 2), (1, 3), (2, 3))
    )
    assert isinstance(first, Heartbeat)
    assert isinstance(second, Heartbeat)
    assert isinstance(silent, ControlPlane)
    assert not first.lost()
    assert second.lost()
    silent.shutdown(0.0)
    # A rank that has ended well is not lost.
    assert not second.lost()


def test_a_peer_that_reports_its_failure_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.02)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    beats = [Heartbeat(ControlPlane(store, rank, 2)) for rank in range(2)]
    beats[1].peers.fail(1, "Rank 1 failed")
    assert beats[0].lost()
