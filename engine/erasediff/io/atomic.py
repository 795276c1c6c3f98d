"""Atomic writes: files and folders that appear whole or not at all."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from erasediff.errors import UserError

TEMPORARY_SUFFIX = ".partial"
REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOENT, errno.ENOTDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EFBIG, errno.EISDIR, errno.EINVAL),
)


def check_new(path: Path) -> None:
    """UserError if ``path`` exists."""
    if path.exists():
        raise UserError(f"{path} exists already: remove it or choose another name.")


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a folder atomically: yield a hidden sibling of ``path``, and rename it once all of it is on the disk.

    A block that ends early, by a full disk or Ctrl-C, too, leaves ``path`` as it was.

    Args:
        path: The folder to write.
        replace: Replace a folder that exists.

    Raises:
        UserError: ``path`` exists and ``replace`` is false, or the disk refuses.
    """
    if not replace:
        check_new(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = temporary_sibling(path)
        try:
            partial.mkdir()
            yield partial
            publish(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, path: Path) -> None:
    """Rename the filled folder ``partial``, a ``temporary_sibling`` of ``path``, to ``path``, replacing an old one."""
    _sync_tree(partial)
    with _set_aside(path):
        partial.rename(path)
    _sync(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a hidden sibling, and move it over ``path`` once it is on the disk.

    Raises:
        UserError: The disk refuses.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = temporary_sibling(path)
        try:
            yield partial
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``path`` atomically. UserError if the disk refuses."""
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_directory(path: Path) -> None:
    """Remove a folder so that a kill half-way leaves nothing under its name."""
    with _set_aside(path):
        pass


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files and folders of killed processes in ``folder``."""
    for partial in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def temporary_sibling(path: Path) -> Path:
    """Unique hidden path beside ``path``, on the same file system."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Convert errors of the disk while ``path`` is written into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk is full: {path} was not written, and nothing else was changed; free some space and run "
                "the command again, a started run with --resume latest."
            ) from error
        if number in REFUSALS:
            raise UserError(f"Cannot write {path}: {os.strerror(number).lower()}.") from error
        raise


@contextmanager
def _set_aside(path: Path) -> Iterator[None]:
    """Free the name ``path`` for the block, and remove what had it if the block ends well."""
    if not path.exists():
        yield
        return
    aside = temporary_sibling(path)
    path.rename(aside)
    try:
        yield
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside)


def _error_number(error: OSError | SafetensorError) -> int | None:
    """errno of an error; safetensors only mentions it in its message."""
    if isinstance(error, OSError):
        return error.errno
    mentioned = re.search(r"os error (\d+)", str(error))
    return int(mentioned.group(1)) if mentioned else None


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
