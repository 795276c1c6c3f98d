"""Names, links and special files in a checkpoint's folder, refused where they lead out of it or are no files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from erasediff.errors import UserError
from erasediff.io.json_file import shortened
from erasediff.io.user_file import special_kind

LONGEST_NAME = 255
"""In bytes, on all common file systems."""
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that are devices on Windows, with any suffix and in any folder."""


def check_plain_name(name: object, source: Path) -> None:
    """Raise UserError for a ``name`` that ``source`` gives for a file or folder beside it but that no such one has.

    Among them are paths, names longer than file systems allow, and names of devices.
    """
    if not isinstance(name, str) or not _is_plain(name):
        raise UserError(
            f"{source} names {shortened(repr(name))}, which is no file or folder beside it: the checkpoint is damaged."
        )


def _is_plain(name: str) -> bool:
    return (
        name not in ("", ".", "..")
        and name.isprintable()
        and not set(name) & set("/\\:")
        and len(name.encode(errors="replace")) <= LONGEST_NAME
        and not DEVICES.fullmatch(name)
    )


def check_links(root: Path, names: Iterable[str]) -> None:
    """Raise UserError for a link that leads out of a checkpoint or to a folder of its own, and for what is no file.

    What a link leads to would be read as part of the model and copied into the one that is saved. The hub's cache is
    made of links: its snapshots hold them, the files lie in the folder of blobs beside. Pipes, sockets and devices are
    refused, since a reader would wait for them.

    Args:
        root: The checkpoint's folder.
        names: Of the files and folders in it that are read.
    """
    real = Path(os.path.realpath(root))
    allowed = [real, *(parent.parent / "blobs" for parent in real.parents if parent.name == "snapshots")]
    for path in _entries(root, names):
        if (kind := special_kind(path)) is not None and not path.is_dir():
            raise UserError(f"{path} is {kind}, not a file: put a regular file in its place.")
        if not path.is_symlink():
            continue
        # Not ``resolve``, which raises for a link to itself.
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(folder) for folder in allowed):
            raise UserError(f"{path} is a link that leads out of the checkpoint: put what it stands for in its place.")
        if target.is_dir() and path.parent != root:
            raise UserError(f"{path} is a link to a folder: put what it stands for in its place.")


def _entries(root: Path, names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        yield root / name
        for folder, folders, files in os.walk(root / name):
            yield from (Path(folder, inner) for inner in (*folders, *files))
