"""Fixtures of tests of whole commands."""

from collections.abc import Callable

import pytest
from helpers import Ended, run_command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """``run(*arguments)``: the command line in this process, with what it printed."""

    def captured(*arguments: object) -> Ended:
        capsys.readouterr()
        code = run_command(*arguments)
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err)

    return captured
