"""Metadata of image folders: ``metadata.jsonl`` and ``metadata.csv`` in any folder, as ImageFolder of ``datasets``."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasediff.data.folder_listing import FolderListing, is_hidden
from erasediff.data.path_index import PathIndex, spellings
from erasediff.errors import UserError
from erasediff.io.json_file import parse_json
from erasediff.io.user_file import read_text

FILE_COLUMN = "file_name"
CAPTION_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True, slots=True)
class MetadataRow:
    """A row of a metadata file.

    Attributes:
        place: the file and the line, for messages.
        columns: values by name, without ``file_name``.
    """

    place: str
    columns: Mapping[str, Any]

    def captions_and_attributes(self, caption_column: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
        """Captions, and the other columns as text; null and an empty text are missing values.

        Args:
            caption_column: None for the first of ``text``, ``caption`` and ``prompt`` that holds a caption.

        Raises:
            UserError: for a caption that is neither a text nor a list of texts.
        """
        for name in CAPTION_COLUMNS if caption_column is None else (caption_column,):
            captions = captions_in(self.columns.get(name), f"{self.place}: {name}")
            if captions:
                break
        attributes = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in self.columns.items()
            if value not in (None, "", []) and key != name
        }
        return captions, attributes


def captions_in(value: Any, place: str) -> tuple[str, ...]:
    """Captions of a column's value: a text, a list of texts, or none for null and empty ones.

    Raises:
        UserError: for another value, which names ``place``.
    """
    if isinstance(value, str):
        return (text,) if (text := value.strip()) else ()
    values = value if isinstance(value, list | tuple) else (value,)
    for one in values:
        if one is not None and not isinstance(one, str):
            raise UserError(f"{place} is {json.dumps(value)[:60]}: a caption is a text or a list of texts.")
    return tuple(text for text in (one.strip() for one in values if one is not None) if text)


def read_metadata(listing: FolderListing, folder: Path) -> dict[Path, MetadataRow]:
    """Rows of all metadata files of a folder, by the image that each names relative to its own metadata file.

    A name may be absolute, have backslashes, or be in another Unicode form than on the disk.

    Raises:
        UserError: for two metadata files in one folder, a line that cannot be read, a row without or with another row's
            ``file_name``, and a row that names no image of ``folder``.
    """
    for parent in {table.parent for table in listing.tables}:
        names = [table.name for table in listing.tables if table.parent == parent]
        if len(names) > 1:
            raise UserError(f"{parent} has both {' and '.join(sorted(names))}: remove one of them.")
    index = PathIndex((image.path, image.path) for image in listing.images)
    rows: dict[Path, MetadataRow] = {}
    for table in sorted(listing.tables):
        for line, columns in _rows(table):
            place = f"{table}, line {line}"
            name = columns.pop(FILE_COLUMN, None)
            if name is None or name == "":
                raise UserError(f"{place}: there is no {FILE_COLUMN}, the image that the row is about.")
            if not isinstance(name, str):
                raise UserError(f"{place}: {FILE_COLUMN} is {json.dumps(name)}: write it as a text, in quotes.")
            path = _named(index, table.parent, name)
            if path is None:
                raise UserError(f"{place}: {_no_image(index, table.parent, name, folder)}.")
            if path in rows:
                raise UserError(f"{place}: {name} has a row already, {rows[path].place}; keep one of them.")
            rows[path] = MetadataRow(place, columns)
    return rows


def _named(index: PathIndex[Path], parent: Path, name: str) -> Path | None:
    return next(
        (path for spelt in spellings(name) if (path := index.at(os.path.join(parent, spelt))) is not None), None
    )


def _no_image(index: PathIndex[Path], parent: Path, name: str, folder: Path) -> str:
    path = parent / name
    if "\0" not in name and path.is_file():
        real, root = path.resolve(), folder.resolve()
        if not real.is_relative_to(root):
            return f"{path} is outside of {folder}; move it there or remove the row"
        if any(is_hidden(part) for part in real.relative_to(root).parts):
            return f"{path} is hidden; give it, and its folder, a name without a dot at the beginning"
        return f"{path} is no image that can be read; convert it to PNG or remove the row"
    similar = _suggestion(index.near(name))
    return f"there is no image {path}{similar}; remove the row or add the file"


def _suggestion(paths: Sequence[str]) -> str:
    return f" (did you mean {' or '.join(paths)}?)" if paths else ""


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = read_text(table)
    except UnicodeDecodeError:
        raise UserError(f"{table} is not UTF-8 text: save it in that encoding.") from None
    except OSError as error:
        raise UserError(f"Cannot read {table}: {error.strerror}.") from error
    return _json_rows(table, text) if table.suffix == ".jsonl" else _csv_rows(table, text)


def _json_rows(table: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines, which also splits at separators that JSON allows within a text.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = parse_json(content)
        except ValueError as error:
            raise UserError(f"{table}, line {line} cannot be read: {error}.") from None
        if not isinstance(row, dict):
            raise UserError(f'{table}, line {line} is not an object such as {{"{FILE_COLUMN}": ..., "text": ...}}.')
        yield line, row


def _csv_rows(table: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{table}, line {reader.line_num} has another number of columns than the first line.")
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{table}, line {reader.line_num} is not CSV: {error}.") from None
