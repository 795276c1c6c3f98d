"""Strict JSON and JSON lines: ``metrics.jsonl`` with one record per step; numbers that are not finite become null."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_write, storage_errors
from erasediff.io.json_file import parse_object
from erasediff.io.user_file import LARGEST_TEXT, read_bytes

Record = Mapping[str, Any]


class MetricsFile:
    """Metrics of a run as JSON lines, appended during the run.

    A resumed run writes the records of its steps over those of a run that had gone further, and each of these stays
    until then: a checkpoint that is later than the resumed one keeps its records.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._overwrites = False

    def append(self, records: Iterable[Record]) -> None:
        """Append one line per record and flush it to the disk. Numbers that are not finite are written as null."""
        new = list(records)
        lines = "".join(dumps(record) + "\n" for record in new)
        if self._overwrites and new:
            self._overwrite(lines, new[0]["step"], new[-1]["step"])
            return
        with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def continue_after(self, step: int) -> int:
        """Prepare for the records of the steps after ``step``; a last line that a kill tore apart goes.

        Returns:
            Number of other lines that are no records, as a power loss may leave them, and that go too.
        """
        if not self.path.exists():
            return 0
        whole, damaged = self._lines()
        self._overwrites = any(found > step for found, _ in whole)
        content = "".join(line for _, line in whole)
        if content.encode() != read_bytes(self.path, LARGEST_TEXT):
            atomic_write(self.path, content)
        return damaged

    def read(self) -> Iterator[dict[str, Any]]:
        """Records so far, oldest first. UserError for a line that is none."""
        if not self.path.exists():
            return
        # A last line without an end is one that a kill tore apart.
        for number, line in enumerate(read_bytes(self.path, LARGEST_TEXT).split(b"\n")[:-1], start=1):
            try:
                yield parse_object(line)
            except ValueError as error:
                raise UserError(f"{self.path}, line {number} is no record: {error}; remove that line.") from None

    def _overwrite(self, lines: str, first: int, last: int) -> None:
        """Put ``lines``, of the steps ``first`` to ``last``, in the place of those that there are of these steps."""
        whole, _ = self._lines()
        before = "".join(line for step, line in whole if step < first)
        after = "".join(line for step, line in whole if step > last)
        atomic_write(self.path, before + lines + after)
        self._overwrites = bool(after)

    def _lines(self) -> tuple[list[tuple[int, str]], int]:
        """Whole lines with their steps, and the number of damaged ones, a torn last line not counted."""
        lines = read_bytes(self.path, LARGEST_TEXT).decode("utf-8", errors="replace").split("\n")[:-1]
        found = [(_step_of(line), line + "\n") for line in lines]
        whole = [(step, line) for step, line in found if step is not None]
        return whole, len(found) - len(whole)


def _step_of(line: str) -> int | None:
    """The step of a record; None for a line that is none."""
    try:
        step = parse_object(line).get("step")
    except ValueError:
        return None
    return step if type(step) is int else None


def dumps(value: Any, indent: int | None = None) -> str:
    """Serialize ``value``, of mappings, sequences and plain values, as strict JSON."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list() | tuple():
            return [_finite(item) for item in value]
        case Mapping():
            return {key: _finite(item) for key, item in value.items()}
    return value
