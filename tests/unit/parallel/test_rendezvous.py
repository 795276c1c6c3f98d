"""Meeting of ranks: variables of an ended run are told, and Ctrl-C ends the wait."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from erasediff.errors import UserError
from erasediff.parallel import rendezvous as module
from erasediff.parallel.rendezvous import rendezvous


@pytest.fixture
def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def set_variables(patch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"} | values).items():
        patch.setenv(name, value)
    patch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"RANK": "x"}, "RANK=x is no number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1 is no number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
    ],
)
def test_variables_that_make_no_sense_are_refused(
    monkeypatch: pytest.MonkeyPatch, port: str, values: dict[str, str], said: str
) -> None:
    set_variables(monkeypatch, **({"MASTER_PORT": port} | values))
    with pytest.raises(UserError, match=said):
        rendezvous(1.0, print)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_without_peers_says_so_and_gives_up(monkeypatch: pytest.MonkeyPatch, port: str, rank: str) -> None:
    set_variables(monkeypatch, RANK=rank, WORLD_SIZE="2", MASTER_PORT=port)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    said: list[str] = []
    with pytest.raises(UserError, match="in vain: RANK="):
        rendezvous(0.5, said.append)
    assert len(said) == 1
    assert "unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT" in said[0]


def test_a_port_that_is_taken_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        set_variables(monkeypatch, MASTER_PORT=str(taken.getsockname()[1]))
        with pytest.raises(UserError, match="choose another MASTER_PORT"):
            rendezvous(5.0, print)


def test_ctrl_c_ends_the_wait_of_a_command(port: str) -> None:
    stale = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = subprocess.Popen(
        [sys.executable, "-m", "erasediff.cli", "info"],
        env={**os.environ, **stale},
        stderr=subprocess.PIPE,
        text=True,
        # As in a terminal: these tests may be a job in the background, which ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert command.stderr is not None
    giving_up = threading.Timer(120, command.kill)
    giving_up.start()
    assert "are left from an earlier run, press Ctrl-C" in command.stderr.readline()
    command.send_signal(signal.SIGINT)
    assert command.wait() == 130
    giving_up.cancel()
