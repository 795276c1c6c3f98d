"""Reading of files that users give: regular files alone, of a bounded size."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from erasediff.errors import UserError

MEGABYTE = 10**6
LARGEST_TEXT = 2000 * MEGABYTE
"""Of a text with a line for each image or prompt: a million of them take a tenth."""
SPECIAL = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def special_kind(path: Path) -> str | None:
    """Kind of what ``path`` is in place of a file, in words; None for a regular file, and where there is nothing.

    Nothing is opened: a pipe waits for whoever writes to it, and a device may act on being opened.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    return next((kind for is_kind, kind in SPECIAL if is_kind(mode)), None)


def check_regular(path: Path) -> None:
    """Raise UserError for a folder, pipe, socket or device in the place of a file, which is not opened."""
    if (kind := special_kind(path)) is not None:
        raise UserError(f"{path} is {kind}, not a file: give a regular file.")


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file.

    Raises:
        UserError: ``path`` is no regular file, or has more than ``limit`` bytes.
        OSError: There is no such file, or it cannot be read; with the name of the file.
    """
    check_regular(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UserError(
                f"{path} has {size / MEGABYTE:,.0f} MB, and at most {limit / MEGABYTE:,.0f} MB are read: it is another "
                "file than is asked for."
            )
        try:
            return file.read()
        except OSError as error:
            # A fault of reading, unlike one of opening, does not say of which file.
            raise OSError(error.errno, error.strerror, str(path)) from None


def read_text(path: Path, limit: int = LARGEST_TEXT) -> str:
    """Read a regular file of UTF-8 text, without a byte order mark, and with any kind of line end as a line feed.

    Raises:
        UserError, OSError: As ``read_bytes``.
        UnicodeDecodeError: It is not UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
