"""Arrow tables in the cache folder, mapped into memory, by the files that they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from erasediff.errors import UserError, reason
from erasediff.io.atomic import atomic_file
from erasediff.io.cache_dir import cache_folder


def cached_table(
    folder: str, files: Sequence[Path], settings: Sequence[object], make: Callable[[], pa.Table], *, least: int = 0
) -> pa.Table:
    """The table that ``make`` yields, made again only if a file or a setting has changed.

    Args:
        folder: Name of a folder of the cache.
        files: What the table is made from: paths, sizes and times tell whether they are the same.
        settings: What else it depends on, and the version of its format; values of JSON.
        make: Makes the table.
        least: Rows below which making the table is as fast as reading it.

    Raises:
        UserError: As ``make``; for a file that is not there, and a damaged table in the cache.
    """
    statuses = [(os.path.abspath(file), _status(file)) for file in files]
    identity = [[path, status.st_size, status.st_mtime_ns] for path, status in statuses]
    digest = hashlib.sha256(json.dumps([identity, settings]).encode()).hexdigest()
    cached = cache_folder() / folder / f"{digest[:32]}.arrow"
    if not cached.is_file():
        table = make()
        if table.num_rows < least:
            return table
        with atomic_file(cached) as partial, pa.ipc.new_file(str(partial), table.schema) as writer:
            writer.write_table(table)
    try:
        return pa.ipc.open_file(pa.memory_map(str(cached))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{cached} is damaged: remove it. ({reason(error)})") from None


def _status(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror or error}.") from None
