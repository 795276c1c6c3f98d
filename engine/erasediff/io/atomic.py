"""Atomic writes: files and folders that appear whole or not at all."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from erasediff.errors import UserError
from erasediff.io.temporary_names import is_abandoned, is_temporary, replaced_path, temporary_name

REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOENT, errno.ENOTDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EFBIG, errno.EISDIR, errno.EINVAL),
)


_swept: set[Path] = set()
"""Folders in which this process has looked for what killed processes left."""


def check_new(path: Path) -> None:
    """UserError if ``path`` exists."""
    _sweep(path.parent)
    if path.exists():
        raise UserError(f"{path} exists already: remove it or choose another name.")


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a folder atomically: yield a hidden sibling of ``path``, and rename it once all of it is on the disk.

    A block that ends early, by a full disk or Ctrl-C, too, leaves ``path`` as it was. What killed processes left beside
    ``path`` is removed.

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
        _sweep(path.parent)
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
    if not path.exists():
        partial.rename(path)
    else:
        # Under a name of its own: after a kill between the two renames, the old folder is put back.
        aside = temporary_sibling(path, replaced=True)
        path.rename(aside)
        try:
            partial.rename(path)
        except BaseException:
            aside.rename(path)
            raise
        shutil.rmtree(aside)
    _sync(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a hidden sibling, and move it over ``path`` once it is on the disk.

    Raises:
        UserError: The disk refuses.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
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
    if path.exists():
        aside = temporary_sibling(path)
        path.rename(aside)
        shutil.rmtree(aside)


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files and folders in ``folder``, which no other process writes to."""
    for path in _temporaries(folder):
        _clear(path)


def remove_abandoned(folder: Path) -> None:
    """Remove unfinished files and folders of killed processes in ``folder``; what others are writing stays."""
    for path in _temporaries(folder):
        if is_abandoned(path):
            _clear(path)


def temporary_sibling(path: Path, *, replaced: bool = False) -> Path:
    """Unique hidden path beside ``path``, on the same file system; ``replaced`` for an old folder that makes room."""
    return path.with_name(temporary_name(path.name, replaced=replaced))


def _sweep(folder: Path) -> None:
    if folder not in _swept:
        _swept.add(folder)
        remove_abandoned(folder)


def _temporaries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if is_temporary(entry.name)]
    except OSError:
        return []


def _clear(path: Path) -> None:
    """Put back a folder that was to be replaced, if nothing took its place; remove anything else."""
    original = replaced_path(path)
    with suppress(OSError):
        if original is not None and not original.exists():
            path.rename(original)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
