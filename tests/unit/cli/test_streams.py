"""Streams that refuse, and exceptions that nobody expected: the command goes on, or ends with one sentence."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from erasediff.cli.crash import as_user_error, keep_crash_log_in, log_crash
from erasediff.cli.output import print_error
from erasediff.cli.streams import LossyStream

BEGIN = """
import sys
from erasediff.cli import main as entry
from erasediff.cli.output import messages, results
def command(code):
    def run():
        exec(code)
        return 0
    entry.__globals__["_exit_code"] = run
    entry()
"""


def run_code(code: str, redirection: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"{BEGIN}\ncommand({code!r})"
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


PRINTS = "print('result'); messages.print('note')"


@pytest.mark.parametrize(
    ("redirection", "code", "errors"),
    [
        ("", 0, "note\n"),
        ("2> /dev/full", 0, ""),
        ("2>&-", 0, ""),
        ("> /dev/full", 1, "note\nError: The command has done its work, but its results could not be printed: "
         "no space left on device.\n"),
        (">&-", 0, "note\n"),
        ("| true", 0, "note\n"),
    ],
)  # fmt: skip
def test_what_a_stream_refuses_costs_no_run(redirection: str, code: int, errors: str) -> None:
    ended = run_code(PRINTS, redirection)
    assert (ended.returncode, ended.stderr) == (code, errors)


def test_a_path_that_the_terminal_cannot_show_is_escaped() -> None:
    ended = run_code("print('\u00e9.png')", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stdout) == (0, "\\xe9.png\n")


def test_an_unexpected_exception_is_one_sentence_and_a_log(tmp_path: Path) -> None:
    ended = run_code("{}['missing']", ERASEDIFF_CACHE=str(tmp_path))
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: An unexpected error, which is a fault of erasediff and not yours (KeyError")
    assert ended.stderr.count("\n") == 1
    assert "KeyError: 'missing'" in (tmp_path / "crash.log").read_text()


def test_the_log_of_a_run_is_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    try:
        keep_crash_log_in(tmp_path / "run")
        assert str(tmp_path / "cache/crash.log") in log_crash(KeyError("x"))
        (tmp_path / "run").mkdir()
        assert str(tmp_path / "run/crash-rank-1.log") in log_crash(KeyError("x"), rank=1)
    finally:
        keep_crash_log_in(None)


def test_a_limit_of_the_machine_is_no_fault_of_the_program() -> None:
    long = OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300)
    assert str(as_user_error(long)).endswith("xxx...: file name too long.")
    assert "not enough memory" in str(as_user_error(MemoryError()))
    assert as_user_error(KeyError("x")) is None


def test_a_refused_stream_says_why_once(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as target:
        stream = LossyStream(target)
    assert stream.write("text") == 4
    assert isinstance(stream.refusal, ValueError)
    stream.flush()
    assert not stream.isatty()


def test_an_error_is_one_line_and_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of files may hold escape sequences and line ends."""
    print_error("a\nb\x1b[2J\udc80 é [red]x")
    assert capsys.readouterr().err == "Error: a\\nb\\x1b[2J\\udc80 é [red]x\n"
