"""Names of unfinished files and folders, which tell whose they are: a killed process's are removed by the next one."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import socket
import time
from pathlib import Path

UNFINISHED, REPLACED = "partial", "replaced"
ABANDONED_SECONDS = 24 * 3600.0
"""Age from which an unfinished file counts as left behind, whatever machine wrote it."""
# Until machines were named, a name had none.
_NAME = re.compile(
    rf"\.(?P<name>.+)\.(?:(?P<machine>[0-9a-f]{{8}})-)?(?P<process>\d+)-[0-9a-f]{{8}}\.(?P<kind>{UNFINISHED}|{REPLACED})",
    re.DOTALL,
)


def temporary_name(name: str, *, replaced: bool = False) -> str:
    """Unique hidden name of ``name`` while this process writes it; with ``replaced``, of what it is to replace."""
    kind = REPLACED if replaced else UNFINISHED
    return f".{name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}"


def is_temporary(name: str) -> bool:
    """Return true for a name of ``temporary_name``."""
    return _NAME.fullmatch(name) is not None


def replaced_path(path: Path) -> Path | None:
    """Path that a folder had before it was to be replaced; None for another temporary name."""
    found = _NAME.fullmatch(path.name)
    return path.with_name(found["name"]) if found is not None and found["kind"] == REPLACED else None


def is_abandoned(path: Path) -> bool:
    """Return true if the process that wrote ``path``, of a temporary name, is gone; on another machine, by its age."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        return False
    if found["machine"] == _machine():
        return not _is_running(int(found["process"]))
    try:
        return time.time() - path.lstat().st_mtime > ABANDONED_SECONDS
    except OSError:
        return False


@functools.cache
def _machine() -> str:
    """Processes with equal values see each other's numbers: those of a host and, in containers, of a namespace."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
