"""One process at a time writes to a run."""

import errno
import fcntl
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from erasediff.errors import UserError
from erasediff.training.run_lock import run_lock

QUIET = Console(quiet=True)


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    run = tmp_path / "runs/one"
    held = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from erasediff.training.run_lock import run_lock\n"
        "with run_lock(Path(sys.argv[1]), Console(quiet=True)): print('held', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", held, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="Another process is writing to the run"), run_lock(run, QUIET):
        pass
    first.kill()
    first.wait()
    with run_lock(run, QUIET):
        pass
    assert os.listdir(run) == []


def test_a_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path / "a/b", QUIET):
        raise KeyError
    assert os.listdir(tmp_path) == []
    with run_lock(tmp_path / "a/b", QUIET):
        (tmp_path / "a/b/config.yaml").touch()
    assert os.listdir(tmp_path / "a/b") == ["config.yaml"]


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = io.StringIO()
    with run_lock(tmp_path, Console(file=said, width=300)):
        pass
    assert "cannot be locked" in said.getvalue()
