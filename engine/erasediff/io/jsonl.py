"""Strict JSON and JSON lines: ``metrics.jsonl`` with one record per step; numbers that are not finite become null."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from erasediff.io.atomic import atomic_write, storage_errors

Record = Mapping[str, Any]


class MetricsFile:
    """Lines appended as a run goes on, cut back to a checkpoint's step when it is resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, records: Iterable[Record]) -> None:
        """Add one line per record and see it onto the disk. A number that is not finite is written as null."""
        lines = "".join(dumps(record) + "\n" for record in records)
        with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def cut_back(self, step: int) -> None:
        """Keep the records of steps 1 to ``step``; a last line that a kill tore apart goes too."""
        if self.path.exists():
            kept = [dumps(record) + "\n" for record in self.read() if record["step"] <= step]
            atomic_write(self.path, "".join(kept))

    def read(self) -> Iterator[dict[str, Any]]:
        """The records so far, oldest first."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def dumps(value: Any, indent: int | None = None) -> str:
    """``value``, of mappings, sequences and plain values, as strict JSON."""
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
