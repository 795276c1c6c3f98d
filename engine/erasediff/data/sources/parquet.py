"""Parquet files with a column of images, as Hugging Face data sets on the hub are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erasediff.data.folder_listing import UNREAD_METADATA
from erasediff.data.hf_datasets import SAVED
from erasediff.data.image_folder import CLASS
from erasediff.data.sources.base import ImageSet, ReadOptions
from erasediff.data.sources.descriptions import Descriptions, described_images
from erasediff.data.sources.parquet_images import PATH, ImageColumn, RowGroups, dataset_features
from erasediff.data.sources.splits import TRAIN, files_in, files_of_split
from erasediff.data.sources.webdataset import is_shard_folder
from erasediff.errors import UserError, reason
from erasediff.io.user_file import check_regular

SUFFIX = ".parquet"
LABEL = "label"
ROWS_AT_ONCE = 4096
SHOWN = 3


class ParquetSource:
    """A ``.parquet`` file or a folder of them, in ``data`` too: a column of images, and others that describe them.

    An image is called as in the ``path`` of its column, or by its row. Texts, numbers and the names of a ClassLabel are
    its attributes; ``label`` is its class for want of ``class``.
    """

    has_captions = True

    def reads(self, location: str) -> bool:
        if location.lower().endswith(SUFFIX):
            return True
        folder = Path(location)
        return bool(_files_in(folder)) and not any((folder / name).is_file() for name in SAVED)

    def read(self, location: str, options: ReadOptions) -> ImageSet:
        files = [_File.open(path) for path in _files(location, options.split)]
        first = files[0]
        names = first.class_names(options.class_column)
        for file in files:
            if file.images.leaf != first.images.leaf or file.class_names(options.class_column) != names:
                raise UserError(f"{file.path} has other images or classes than {first.path}: give one of them.")
            file.check_images()

        def describe(descriptions: Descriptions) -> Sequence[str]:
            for number, file in enumerate(files):
                for row, name, columns in file.rows():
                    label = columns.get(LABEL)
                    attributes = (
                        {} if label is None else {CLASS: label if isinstance(label, str) else json.dumps(label)}
                    )
                    descriptions.append(number, name, columns, place=f"{file.path}, row {row}", attributes=attributes)
            return names

        paths = [file.path for file in files]
        read = RowGroups(paths, first.images, [file.group_sizes for file in files])
        return described_images(location, paths, options, describe, read, "name the column with captions")


@dataclass(frozen=True, slots=True)
class _File:
    """A parquet file, of which the schema and the sizes of its row groups are known."""

    path: Path
    schema: pa.Schema
    metadata: Any
    images: ImageColumn

    @classmethod
    def open(cls, path: Path) -> _File:
        """Read the footer of a file. UserError for one that is damaged or has no images."""
        check_regular(path)
        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read as parquet: {reason(error)}.") from None
        return cls(path, schema, metadata, ImageColumn(path, schema))

    @property
    def group_sizes(self) -> list[int]:
        """Number of rows of each row group."""
        return [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]

    def class_names(self, column: str) -> tuple[str, ...]:
        """Names of the classes by number, if ``column``, or ``label`` for ``class``, is a ClassLabel."""
        return self._labels().get(LABEL if column == CLASS and CLASS not in self.schema.names else column, ())

    def _labels(self) -> dict[str, tuple[str, ...]]:
        features = dataset_features(self.schema)
        return {
            name: tuple(map(str, kind["names"]))
            for name, kind in features.items()
            if kind.get("_type") == "ClassLabel" and isinstance(kind.get("names"), list)
        }

    def check_images(self) -> None:
        """UserError that names the rows without an image, where the file says that there are some."""
        column = next(
            number
            for number in range(self.metadata.num_columns)
            if self.metadata.schema.column(number).path == self.images.leaf
        )
        first, missing, count = 0, list[int](), 0
        for group, size in enumerate(self.group_sizes):
            statistics = self.metadata.row_group(group).column(column).statistics
            nulls = statistics.null_count if statistics is not None and statistics.has_null_count else 0
            count += nulls
            if nulls and len(missing) < SHOWN:
                with pq.ParquetFile(self.path) as file:
                    images = self.images.bytes_of(file.read_row_group(group, columns=[self.images.leaf]))
                missing += [first + row for row, is_null in enumerate(images.is_null().to_pylist()) if is_null]
            first += size
        if missing:
            raise UserError(
                f"{self.path} has rows without the bytes of an image, {count:,} in all, from 0: "
                f"{', '.join(map(str, missing[:SHOWN]))}; remove them, or put the images into the file, since those "
                "elsewhere are not read."
            )

    def rows(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """(number, name, columns that describe it) of each image, without reading one."""
        labels, images = self._labels(), self.images
        kept = [field.name for field in self.schema if field.name != images.name and _describes(field.type)]
        if images.path_leaf is not None:
            kept.append(images.path_leaf)
        if not kept:
            yield from ((row, f"{row:05d}", {}) for row in range(self.metadata.num_rows))
            return
        duplicates, row = self._duplicates(), 0
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=kept):
                columns = batch.to_pydict()
                stored = columns.pop(images.name, None) or [None] * batch.num_rows
                for name in columns.keys() & labels.keys():
                    columns[name] = [_named(self.path, name, labels[name], value) for value in columns[name]]
                for image, *values in zip(stored, *columns.values(), strict=True):
                    path = image[PATH] if image else None
                    name = _name(path, row) if path not in duplicates else f"{row:05d}/{_name(path, row)}"
                    yield row, name, dict(zip(columns, values, strict=True))
                    row += 1

    def _duplicates(self) -> set[str]:
        """Names that several images have, which tell none of them."""
        if self.images.path_leaf is None:
            return set()
        with pq.ParquetFile(self.path) as file:
            paths = file.read([self.images.path_leaf]).column(0)
        counts = pc.value_counts(pc.struct_field(paths, PATH))
        return {entry["values"] for entry in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist()} - {None}


def _files_in(folder: Path) -> list[Path]:
    """Parquet files of images in a folder, or in its ``data``; not those that describe shards or image files there."""
    found = [*files_in(folder, (SUFFIX,)), *files_in(folder / "data", (SUFFIX,))]
    found = [file for file in found if file.name != UNREAD_METADATA]
    return [] if found and is_shard_folder(folder) else found


def _files(location: str, split: str) -> list[Path]:
    if "://" in location:
        raise UserError(f"{location} is not here, and nothing is downloaded: give the path of a copy.")
    path = Path(location)
    if path.is_dir():
        return files_of_split(_files_in(path), split, location)
    check_regular(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}: check the path.")
    return [path] if split == TRAIN else files_of_split([path], split, location)


def _describes(kind: pa.DataType) -> bool:
    """Whether a column holds texts, lists of texts, numbers or truth values."""
    types = pa.types
    if types.is_dictionary(kind):
        return _describes(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_text(kind.value_type)
    return any((_is_text(kind), types.is_integer(kind), types.is_floating(kind), types.is_boolean(kind)))


def _is_text(kind: pa.DataType) -> bool:
    return any((pa.types.is_string(kind), pa.types.is_large_string(kind), pa.types.is_string_view(kind)))


def _named(path: Path, column: str, names: Sequence[str], value: int | None) -> str | None:
    """Name of a class; None for a missing one, which data sets number -1."""
    if value is None or value == -1:
        return None
    if not 0 <= value < len(names):
        raise UserError(f"{path}: {column} is {value}, but its classes are 0 to {len(names) - 1}: correct the file.")
    return names[value]


def _name(path: str | None, row: int) -> str:
    """Name of an image in its file: its path without what would lead out of it."""
    if path and "/" not in path and "\\" not in path and path not in (".", ".."):
        return path
    parts = [part for part in (path or "").replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or f"{row:05d}"


SOURCE = ParquetSource()
