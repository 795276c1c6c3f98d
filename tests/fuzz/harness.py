"""Fuzzed tests: rounds of generated inputs, each of which a command takes or refuses in one sentence."""

from __future__ import annotations

import faulthandler
import functools
import io
import os
import resource
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import pytest
from helpers import Ended, run_command
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from erasediff.cli import crash
from erasediff.errors import RunFailedError, UserError

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
"""For all targets together; 0 runs the same few inputs every time."""
FINDINGS = Path(__file__).parents[2] / ".fuzz"
"""Inputs that failed; a run with ``FUZZ_SECONDS`` begins with them."""
HANG_SECONDS = 20
ROUND = 1_000
MEMORY = 6 * 2**30
"""Bytes that inputs may make the process take."""
LONGEST_SENTENCE = 3_000
CODES = (0, 2, 3)

counts: Counter[str] = Counter()
"""Inputs that were run, by target."""
shares: dict[str, float] = {}
"""Seconds of each target."""


class Hang(BaseException):
    """An input that took more than ``HANG_SECONDS``; no ``Exception``, which the command line would catch."""


def fuzzed(examples: int, **inputs: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on generated inputs: ``examples`` of them, always the same, or new ones for its share of ``SECONDS``.

    Args:
        examples: Number of inputs.
        inputs: Strategies by the parameters of the test; the others are fixtures, which all inputs share.
    """
    common: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    if SECONDS:
        database = DirectoryBasedExampleDatabase(FINDINGS)
        chosen = settings(max_examples=ROUND, database=database, print_blob=True, **common)
    else:
        chosen = settings(max_examples=examples, derandomize=True, database=None, **common)

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def counted(**arguments: Any) -> None:
            if time.monotonic() < deadline[0]:
                counts[check.__name__] += 1
                check(**arguments)

        deadline = [0.0]
        tested = chosen(hypothesis.given(**inputs)(counted))

        @functools.wraps(tested)
        def rounds(**fixtures: Any) -> None:
            began = time.monotonic()
            deadline[0] = began + shares.get(check.__name__, SECONDS) if SECONDS else float("inf")
            tested(**fixtures)
            while SECONDS and time.monotonic() < deadline[0]:
                hypothesis.seed(secrets.randbits(64))(tested)
                tested(**fixtures)

        return rounds

    return decorate


@contextmanager
def watchdog() -> Iterator[None]:
    """Raise ``Hang`` in a block that works or waits too long; end the process where not even that is possible.

    What other processes take of a busy machine does not count: each interval has to be idle, or all of them to be work.
    """
    work = [time.process_time()]

    def hang(*_: object) -> None:
        work.append(time.process_time())
        if work[-1] - work[-2] < HANG_SECONDS / 20 or work[-1] - work[0] > HANG_SECONDS:
            raise Hang(f"{work[-1] - work[0]:.1f} s of work in {(len(work) - 1) * HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS, HANG_SECONDS)
    faulthandler.dump_traceback_later(6 * HANG_SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def refusal(action: Callable[[], object]) -> str | None:
    """The sentence by which ``action`` refuses its input, as the command line would print it; None if it takes it.

    Whatever else it raises passes.
    """
    with watchdog(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            action()
        except (UserError, RunFailedError) as error:
            return _checked(str(error))
        except Exception as error:
            known = crash.as_user_error(error)
            if known is None:
                raise
            return _checked(str(known))
    return None


def command(*arguments: object) -> Ended:
    """Run the command line in this process: it must end with one of ``CODES`` and without a traceback."""

    def expose(error: BaseException, rank: int | None = None) -> NoReturn:
        raise error

    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, watchdog(), redirect_stdout(output), redirect_stderr(errors):
        # By the module: the package has a function of its name.
        patch.setattr(import_module("erasediff.cli.main"), "log_crash", expose)
        ended = Ended(run_command(*arguments), output.getvalue(), errors.getvalue())
    printed = ended.output + ended.errors
    assert ended.code in CODES, printed
    assert "Traceback (most recent call last)" not in printed, printed
    if ended.code == 2:
        assert "rror" in ended.errors, printed
    return ended


def _checked(sentence: str) -> str:
    assert sentence.strip()
    assert len(sentence) <= LONGEST_SENTENCE, f"{len(sentence)} characters: {sentence[:300]}..."
    return sentence


def tree(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every path under ``folder`` with what changes where one writes to it."""
    found: dict[str, tuple[int, ...]] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            with suppress(OSError):
                status = os.lstat(path)
                changing = (status.st_size, status.st_mtime_ns) if name in files else ()
                found[path] = (status.st_mode, status.st_ino, *changing)
    return found


@contextmanager
def limited_memory() -> Iterator[None]:
    """Refuse memory beyond ``MEMORY`` more than the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
