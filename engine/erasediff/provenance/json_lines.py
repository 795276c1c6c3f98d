"""JSON lines of a run that has ended: each is whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from erasediff.errors import UserError
from erasediff.io.json_file import parse_object
from erasediff.io.user_file import LARGEST_TEXT, read_bytes


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON lines file. UserError that names the line which is none, or which was cut short."""
    lines = read_bytes(path, LARGEST_TEXT).split(b"\n")
    if lines.pop():
        raise UserError(f"{path} is cut short: its last line, {len(lines) + 1}, does not end.")
    for number, line in enumerate(lines, start=1):
        try:
            yield parse_object(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}, is no record: {error}.") from None
