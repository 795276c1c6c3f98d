"""Lock of a run's folder: one process at a time writes to a run."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from erasediff.errors import UserError
from erasediff.io.atomic import storage_errors

NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF})
"""Answers of file systems that have no locks."""


@contextmanager
def run_lock(folder: Path, console: Console) -> Iterator[None]:
    """Hold the lock of ``folder`` within the block; it is made if it is not there, and goes again if it stays empty.

    The lock is the folder's own (``flock``), so nothing is left behind and the end of the process, however it comes,
    releases it. Where the file system has no locks, ``console`` is told.

    Raises:
        UserError: Another process holds the lock, or the folder cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is writing to the run in {folder}: wait until it ends, or choose another --out."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            console.print(f"{folder} cannot be locked: start no second process on this run.", soft_wrap=True)
        yield
    finally:
        with suppress(OSError):
            # A refusal leaves nothing behind.
            for path in made:
                path.rmdir()
        os.close(descriptor)
