"""Kills at a chosen call that changes the disk, in forked processes: the calls are counted first, then each is fatal.

A process is killed (SIGKILL) before the call takes place, so that a kill at each of them leaves each state of the disk
that a kill can leave between calls. Files of tensors are also torn in the middle.
"""

from __future__ import annotations

import builtins
import errno
import importlib
import io
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from forked import Forked

SECONDS = 240
DISK_CALLS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync", "link", "symlink", "truncate")
NEED_ROOM = ("mkdir", "open", "write", "fsync")
ROOT, FATAL, TRACE, FULL = "CRASH_ROOT", "CRASH_AT", "CRASH_TRACE", "CRASH_FULL_DISK"


@dataclass(frozen=True)
class Case:
    """A command that is killed.

    Attributes:
        name: Name in the report.
        begin: Words of the command, by the folder that it writes to: "module:function" and its arguments.
        again: The command after a kill, likewise; ``begin`` by default.
        check: Raises if anything passes for whole and is not, in (the folder that a kill left, that of no kill).
        compared: Folder within which the uninterrupted command and the resumed one leave the same bytes.
        prepare: Fills the folder before the command.
    """

    name: str
    begin: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]] | None = None
    check: Callable[[Path, Path], None] = lambda _killed, _whole: None
    compared: str = "."
    prepare: Callable[[Path], None] = lambda _: None


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def different(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Files that one of them lacks, or that differ."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.suffix in (".partial", ".replaced")]


def kill_at_each_call(case: Case, place: Path, *, most: int | None = None) -> Counter[str]:
    """Kill the command at each of its calls, or at ``most`` evenly spaced ones, and continue each time.

    Returns:
        Number of kills by kind of call.
    """
    whole = place / "whole"
    calls = run_whole(case, whole)
    assert leftovers(whole) == []
    expected = contents(whole / case.compared)
    kills: Counter[str] = Counter()
    for number in evenly(len(calls), most):
        folder = place / f"kill-{number}"
        folder.mkdir()
        case.prepare(folder)
        process = start(case.begin(folder), folder, number)
        process.communicate(timeout=SECONDS)
        where = f"{case.name}, {number} of {len(calls)}"
        assert process.returncode == -signal.SIGKILL, where
        call = trace_of(folder)[-1]
        kills[call.split()[0]] += 1
        where = f"{where}: killed at {call}"
        try:
            case.check(folder, whole)
            process = start((case.again or case.begin)(folder), folder)
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors[-2000:]
            differing = different(contents(folder / case.compared), expected)
            assert differing == [], f"other files: {differing}"
            assert leftovers(folder) == [], f"left behind: {leftovers(folder)}"
        except Exception as error:
            raise AssertionError(f"{where}: {error}") from error
        shutil.rmtree(folder)
    return kills


def run_whole(case: Case, folder: Path) -> list[str]:
    """Run the command without a kill, and return its calls."""
    folder.mkdir()
    case.prepare(folder)
    process = start(case.begin(folder), folder)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return trace_of(folder)


def evenly(total: int, most: int | None) -> Iterable[int]:
    """Numbers from 1 to ``total``, or ``most`` of them, both ends among them."""
    if most is None or most >= total:
        return range(1, total + 1)
    return sorted({1 + round(place * (total - 1) / (most - 1)) for place in range(most)})


def start(words: list[str], root: Path, fatal: int = 0, *, trace: str = "", **variables: str) -> Forked:
    """Start the function ``words[0]`` ("module:function") with the other words.

    Args:
        words: The function and its argument.
        root: Calls on paths beneath it count.
        fatal: Number of the call at which the process is killed; 0 for none.
        trace: Name of the trace among those of the folder.
        variables: Environment; with ``FULL``, that call and all later ones that need room find a full disk instead.
    """
    path = trace_file(root, trace)
    path.unlink(missing_ok=True)
    chosen = {ROOT: str(root), FATAL: str(fatal), TRACE: str(path)}
    cache = {"ERASEDIFF_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return Forked(observed, words, {**os.environ, **cache, **chosen, **variables})


def trace_file(root: Path, name: str = "") -> Path:
    return root.with_name(f"{root.name}{name}.trace")


def trace_of(root: Path, name: str = "") -> list[str]:
    """The calls of a process so far, "kind path" each."""
    return trace_file(root, name).read_text().splitlines()


def observed(words: list[str]) -> None:
    """In the forked process: count the calls, and be killed at the chosen one."""
    observe()
    module, _, name = words[0].partition(":")
    getattr(importlib.import_module(module), name)(words[1:])


def observe() -> None:
    """Replace the functions of ``os`` that change the disk, and ``open``, by ones that write a trace or kill."""
    from erasediff.io import tensor_file
    from erasediff.io.tensor_file import StoredTensor

    root, fatal = os.environ[ROOT], int(os.environ[FATAL])
    trace = os.open(os.environ[TRACE], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    numbers = count(1)

    def reached(kind: str, path: str) -> None:
        if path.startswith(root):
            number = next(numbers)
            os.write(trace, f"{kind} {path.removeprefix(root)}\n".encode())
            if FULL in os.environ and 0 < fatal <= number and kind in NEED_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            if FULL not in os.environ and number == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def replaced(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **keywords: Any) -> Any:
            reached(kind, _absolute(path, keywords.get("dir_fd")))
            return original(path, *arguments, **keywords)

        return call

    def opened(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if set(mode) & set("wax") and not isinstance(file, int):
            reached("open", os.path.abspath(os.fspath(file)))
        return original_open(file, mode, *arguments, **keywords)

    def write_tensors(file: Any, ordered: Sequence[tuple[str, StoredTensor]], *arguments: Any, **keywords: Any) -> None:
        torn = len(ordered) // 2
        marked = [(name, torn_at(tensor) if place == torn else tensor) for place, (name, tensor) in enumerate(ordered)]
        original_write(file, marked, *arguments, **keywords)

    def torn_at(tensor: StoredTensor) -> StoredTensor:
        return replace(tensor, load=lambda: (reached("write", root), tensor.load())[1])

    original_open, original_write = io.open, tensor_file.write_tensors
    for kind in DISK_CALLS:
        setattr(os, kind, replaced(kind, getattr(os, kind)))
    io.open = builtins.open = opened  # type: ignore[assignment]
    tensor_file.write_tensors = write_tensors


def _absolute(path: Any, folder: int | None) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    if folder is not None:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))
    return os.path.abspath(os.fspath(path))
