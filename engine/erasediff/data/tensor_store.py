"""Key-value store of tensors in memory-mapped safetensors shards."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_file
from erasediff.io.disk_room import check_room
from erasediff.io.json_file import parse_json

SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 30.0
OPEN_SHARDS = 128

Row = Mapping[str, Tensor]


class ShardStore:
    """Rows of tensors by key. Each shard stacks rows of equal shapes, and names their keys in its metadata.

    A shard is named by its content's keys and is written atomically, so processes may write into one folder side by
    side: at worst a row is there twice. Rows are never changed, and stay until the folder is removed.

    Raises:
        UserError: for a shard that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._locations: dict[str, tuple[Path, int]] = {}
        self._tensors = lru_cache(OPEN_SHARDS)(_mapped)
        for shard in sorted(folder.glob("*.safetensors")):
            self._locations.update({key: (shard, number) for number, key in enumerate(_keys(shard))})

    def __contains__(self, key: str) -> bool:
        return key in self._locations

    def __len__(self) -> int:
        return len(self._locations)

    def row(self, key: str) -> dict[str, Tensor]:
        """The tensors under ``key``, views of the file. Raises ``KeyError`` for an unknown key."""
        shard, number = self._locations[key]
        return {name: tensor[number] for name, tensor in self._tensors(shard).items()}

    @contextmanager
    def writing(self, rows: int | None = None) -> Iterator[ShardWriter]:
        """A writer, of ``rows`` rows if that is known; what it was given is on the disk however the block ends."""
        writer = ShardWriter(self, rows)
        try:
            yield writer
        finally:
            writer.flush()

    def _append(self, rows: Mapping[str, Row]) -> None:
        keys = list(rows)
        shard = self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:24]}.safetensors"
        names = rows[keys[0]].keys()
        tensors = {name: torch.stack([rows[key][name] for key in keys]) for name in names}
        with atomic_file(shard) as partial:
            save_file(tensors, partial, metadata={"keys": json.dumps(keys)})
        self._locations.update({key: (shard, number) for number, key in enumerate(keys)})


class ShardWriter:
    """Buffer of rows, written out before much work could be lost.

    The first row is refused if the disk has no room for ``rows`` of its size: ``UserError``.
    """

    def __init__(self, store: ShardStore, rows: int | None = None) -> None:
        self._store = store
        self._rows = rows
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._bytes = 0
        self._since = time.monotonic()

    def add(self, key: str, row: Row) -> None:
        self._pending[key] = {name: tensor.detach().cpu() for name, tensor in row.items()}
        size = sum(tensor.nbytes for tensor in row.values())
        if self._rows is not None:
            check_room(self._store.folder, self._rows * size, f"{self._rows:,} encoded images or captions")
            self._rows = None
        self._bytes += size
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        by_shape: defaultdict[Any, dict[str, Row]] = defaultdict(dict)
        for key, row in self._pending.items():
            by_shape[tuple((name, tensor.shape, tensor.dtype) for name, tensor in row.items())][key] = row
        for rows in by_shape.values():
            self._store._append(rows)
        self._pending, self._bytes, self._since = {}, 0, time.monotonic()


def _keys(shard: Path) -> list[str]:
    try:
        with safe_open(shard, framework="pt") as file:
            keys: list[str] = parse_json(file.metadata()["keys"])
            rows = {file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if not all(isinstance(key, str) for key in keys) or rows != {len(keys)}:
            raise ValueError("its keys are not those of its rows")
        return keys
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"The cache file {shard} is damaged: delete it, and its part is computed again.") from error


def _mapped(shard: Path) -> dict[str, Tensor]:
    try:
        with safe_open(shard, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"The cache file {shard} cannot be read any more: run the command again.") from error
