"""Processes forked from one that has imported torch, diffusers and DeepSpeed, which takes many seconds of a core each.

The process that others are forked from has done that and nothing else: no thread, no process group, no device. CUDA
does not survive a fork: these processes compute on the CPU.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

CASES = Path(__file__).with_name("distributed")
PRELOADED = [file.stem for file in sorted(CASES.glob("*_cases.py"))]
"""Modules that import what ranks need."""
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def preloaded_context() -> ForkServerContext:
    """Processes that are forked from one which has imported ``PRELOADED``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    path = os.pathsep.join(filter(None, (str(CASES), str(CASES.parent), os.environ.get("PYTHONPATH"))))
    variables = {**ON_CPU, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with mock.patch.dict(os.environ, variables):
        forkserver.ensure_running()
    return context


class Forked:
    """A function in a forked process, with the interface of ``subprocess.Popen`` that tests use.

    Args:
        function: Called with ``arguments``; both are pickled.
        arguments: For a command line, the words after ``erasediff``.
        variables: Environment.
    """

    def __init__(self, function: Callable[[list[str]], None], arguments: list[str], variables: dict[str, str]) -> None:
        self.args = arguments
        self._written = [Path(tempfile.mkdtemp(), name) for name in ("output", "errors")]
        options = (function, arguments, variables, os.getcwd(), *map(str, self._written))
        self._process = preloaded_context().Process(target=_call, args=options, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        output, errors = (path.read_text() for path in self._written)
        return output, errors


def _call(
    function: Callable[[list[str]], None],
    arguments: list[str],
    variables: dict[str, str],
    folder: str,
    output: str,
    errors: str,
) -> None:
    for descriptor, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    function(arguments)


def erasediff(arguments: list[str]) -> None:
    """The command line. The ranks that it launches are new interpreters."""
    from helpers import without_verdict

    from erasediff.cli import main

    sys.argv = ["erasediff", *without_verdict(arguments)]
    main()


def script(arguments: list[str]) -> None:
    """The Python script that is named first, with the other arguments."""
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
