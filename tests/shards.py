"""Shards of webdataset, as tests write them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

Members = Iterable[tuple[str, bytes]]


def png(value: int, side: int = 4) -> bytes:
    """A PNG file of one colour."""
    content = io.BytesIO()
    Image.new("RGB", (side, side), (value, 0, 0)).save(content, "PNG")
    return content.getvalue()


def write_shard(path: Path, members: Members, layout: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar file of ``members``, names and contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as shard:
        for name, content in members:
            # Fractions of a second are in an extended header.
            add(shard, name, content, mtime=1.5 if layout == tarfile.PAX_FORMAT else 1)
    return path


def add(shard: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    """Add a member, with ``fields`` of its header."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    shard.addfile(member, io.BytesIO(content))
