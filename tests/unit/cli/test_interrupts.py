"""Ctrl-C before there is anything to save."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

import pytest

from erasediff.cli.interrupts import exit_on_interrupt


def raised_again() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def turned_into_another_error() -> NoReturn:
    """As libraries do that are imported when they are needed."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("cannot import pipelines") from None
    raise AssertionError


@pytest.mark.parametrize("work", [raised_again, turned_into_another_error])
def test_ctrl_c_is_one_line_and_130(work, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended, exit_on_interrupt():
        work()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_other_errors_are_themselves() -> None:
    with pytest.raises(ValueError, match="of a layer"), exit_on_interrupt():
        raise ValueError("of a layer")
