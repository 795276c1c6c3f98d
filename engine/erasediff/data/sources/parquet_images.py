"""Images in parquet files: the column that holds them, and its bytes row group by row group."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erasediff.errors import UserError, reason
from erasediff.io.json_file import parse_object

BYTES, PATH = "bytes", "path"
COLUMN_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "pixels")
HELD_GROUPS, HELD_BYTES = 2, 2**26
"""Row groups that are held however large they are, and the size up to which more of them are."""


class ImageColumn:
    """The column of images of a parquet file.

    Attributes:
        name: Of the column.
        leaf: Path in the file of the images' bytes.
        path_leaf: Path in the file of the images' names; None if they have none.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Find the column. UserError for none, several, or one of addresses."""
        features = dataset_features(schema)
        declared = [name for name, kind in features.items() if kind.get("_type") == "Image" and name in schema.names]
        structs = [field.name for field in schema if _child(field.type, BYTES) is not None]
        binary = [field.name for field in schema if _is_binary(field.type)]
        named = [name for name in COLUMN_NAMES if name in binary]
        found = declared or structs or (named[:1] if len(binary) > 1 else binary)
        if not found:
            raise UserError(_no_images(path, schema))
        self.name = found[0]
        kind = schema.field(self.name).type
        if not _is_binary(kind) and _child(kind, BYTES) is None:
            raise UserError(f"{path}: the images in {self.name} are {kind}, and not the bytes of image files.")
        self.leaf = self.name if _is_binary(kind) else f"{self.name}.{BYTES}"
        has_path = _child(kind, PATH) is not None and pa.types.is_string(_child(kind, PATH))
        self.path_leaf = f"{self.name}.{PATH}" if has_path else None

    def bytes_of(self, table: pa.Table) -> pa.ChunkedArray:
        """The images' bytes, in a table of the column."""
        column = table.column(0)
        return column if self.leaf == self.name else pc.struct_field(column, BYTES)


class RowGroups:
    """Images of parquet files, read in the order of their rows with each row group decoded once.

    At most two row groups are in memory, or more if they are small; so are two open files.

    Args:
        files: Paths of the files.
        column: Column of the images.
        counts: Number of rows of each row group of each file.
    """

    def __init__(self, files: Sequence[Path], column: ImageColumn, counts: Sequence[Sequence[int]]) -> None:
        self._files = files
        self._column = column
        self._groups = [(file, group) for file, groups in enumerate(counts) for group in range(len(groups))]
        self._ends = np.cumsum([count for groups in counts for count in groups])
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._open: tuple[int, Any] | None = None
        self._lock = threading.Lock()

    def __call__(self, number: int) -> bytes:
        group = int(np.searchsorted(self._ends, number, side="right"))
        with self._lock:
            images = self._group(group)
        first = int(self._ends[group - 1]) if group else 0
        content: bytes | None = images[number - first].as_py()
        if content is None:
            raise OSError("its row holds no image")
        return content

    def _group(self, number: int) -> Any:
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        file, group = self._groups[number]
        try:
            if self._open is None or self._open[0] != file:
                self._open = (file, pq.ParquetFile(self._files[file]))
            # Dropped first, so that no third one is there while this is decoded.
            while len(self._held) >= HELD_GROUPS and sum(held.nbytes for held in self._held.values()) > HELD_BYTES:
                self._held.popitem(last=False)
            table = self._open[1].read_row_group(group, columns=[self._column.leaf], use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self._files[file]} cannot be read: {reason(error)}.") from None
        self._held[number] = self._column.bytes_of(table)
        return self._held[number]


def dataset_features(schema: pa.Schema) -> Mapping[str, Mapping[str, Any]]:
    """Kinds of the columns as ``datasets`` writes them into a file's schema; {} for another file."""
    try:
        features = parse_object((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    entries = features.items() if isinstance(features, dict) else ()
    return {name: kind for name, kind in entries if isinstance(kind, dict)}


def _child(kind: pa.DataType, name: str) -> pa.DataType | None:
    if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
        return None
    return kind.field(name).type


def _is_binary(kind: pa.DataType) -> bool:
    return any((pa.types.is_binary(kind), pa.types.is_large_binary(kind)))


def _no_images(path: Path, schema: pa.Schema) -> str:
    links = [name for name in schema.names if name.lower() in (*COLUMN_NAMES, "url", "image_url", "file_name")]
    if links:
        return (
            f"{path}: the column {links[0]} holds addresses or names of images, which are not fetched: give a data set "
            "that holds the images themselves."
        )
    return f"{path} has no column of images: it has {', '.join(schema.names) or 'none'}."
