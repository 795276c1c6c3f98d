"""Names and links in a checkpoint's folder, refused where they lead out of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from erasediff.errors import UserError


def check_plain_name(name: object, source: Path) -> None:
    """Raise UserError for a ``name`` that ``source`` gives for a file or folder beside it but that is a path."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise UserError(f"{source} names {name!r}, which is no file or folder beside it: the checkpoint is damaged.")


def check_links(root: Path, names: Iterable[str]) -> None:
    """Raise UserError for a link among the files of a checkpoint that leads out of it, or to a folder of its own.

    What a link leads to would be read as part of the model and copied into the one that is saved. The hub's cache is
    made of links: its snapshots hold them, the files lie in the folder of blobs beside.

    Args:
        root: The checkpoint's folder.
        names: Of the files and folders in it that are read.
    """
    real = root.resolve()
    allowed = [real, *(parent.parent / "blobs" for parent in real.parents if parent.name == "snapshots")]
    for path in _entries(root, names):
        if not path.is_symlink():
            continue
        target = path.resolve()
        if not any(target.is_relative_to(folder) for folder in allowed):
            raise UserError(f"{path} is a link that leads out of the checkpoint: put what it stands for in its place.")
        if target.is_dir() and path.parent != root:
            raise UserError(f"{path} is a link to a folder: put what it stands for in its place.")


def _entries(root: Path, names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        yield root / name
        for folder, folders, files in os.walk(root / name):
            yield from (Path(folder, inner) for inner in (*folders, *files))
