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
    """Metrics of a run as JSON lines, appended during the run and cut back to the checkpoint's step on resuming."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, records: Iterable[Record]) -> None:
        """Append one line per record and flush it to the disk. Numbers that are not finite are written as null."""
        lines = "".join(dumps(record) + "\n" for record in records)
        with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def cut_back(self, step: int) -> None:
        """Keep the records of steps 1 to ``step``; a last line that a kill tore apart goes too."""
        if self.path.exists():
            lines = [dumps(record) + "\n" for record in self.read() if record["step"] <= step]
            atomic_write(self.path, "".join(lines))

    def read(self) -> Iterator[dict[str, Any]]:
        """Records so far, oldest first."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


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
