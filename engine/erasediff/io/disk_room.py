"""Room and rights on the disk, checked before the work instead of after it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from erasediff.errors import UserError

GB = 1e9


def check_writable(path: Path) -> None:
    """UserError if ``path``, a file or folder that may not exist yet, cannot be written."""
    existing = _existing(path)
    reason = None
    if existing != path and not existing.is_dir():
        reason = errno.ENOTDIR
    elif not os.access(existing, os.W_OK | (os.X_OK if existing.is_dir() else 0)):
        reason = errno.EACCES
    if reason is not None:
        raise UserError(f"Cannot write {path}: {os.strerror(reason).lower()} ({existing}); choose another place.")


def check_folder(path: Path) -> None:
    """UserError if ``path``, a folder that may not exist yet, is something else or cannot be written."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is no folder that results can be written to: choose another place.")
    check_writable(path)


def check_file(path: Path) -> None:
    """UserError if ``path``, a file that may not exist yet, is something else or cannot be written."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file that results can be written to: choose another place.")
    check_writable(path)


def check_room(path: Path, size: int, what: str) -> None:
    """UserError if the disk of ``path``, which may not exist yet, has no room for ``size`` bytes of ``what``."""
    free = shutil.disk_usage(_existing(path)).free
    if size > free:
        raise UserError(
            f"{what} need about {size / GB:,.1f} GB, but the disk of {path} has {free / GB:,.1f} GB free: free some "
            "space, or choose another disk."
        )


def _existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
