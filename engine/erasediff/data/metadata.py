"""``metadata.jsonl`` and ``metadata.csv``: one row per image, in the layout of Hugging Face's ImageFolder."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from erasediff.errors import UserError

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
FILE_COLUMN = "file_name"

Row = Mapping[str, str]


def read_metadata(folder: Path) -> dict[Path, Row]:
    """Each image file that the folder's metadata names, with its other columns as text; {} without a metadata file.

    UserError for two metadata files, a line that cannot be read, a row without or with another row's ``file_name``,
    and a file that does not exist.
    """
    present = [folder / name for name in METADATA_FILES if (folder / name).is_file()]
    if not present:
        return {}
    if len(present) > 1:
        raise UserError(f"{folder} has both {' and '.join(METADATA_FILES)}: remove one of them.")
    table = present[0]
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{table} is not UTF-8 text: save it in that encoding.") from None

    rows: dict[Path, Row] = {}
    for line, columns in _json_rows(table, text) if table.suffix == ".jsonl" else _csv_rows(table, text):
        name = columns.pop(FILE_COLUMN, "")
        path = folder / name
        if not name:
            raise UserError(f"{table}, line {line}: there is no {FILE_COLUMN}, the image that the row is about.")
        if path in rows:
            raise UserError(f"{table}, line {line}: {name} has a row already; keep one of them.")
        if not path.is_file():
            raise UserError(f"{table}, line {line}: there is no image {path}; remove the row or add the file.")
        rows[path] = columns
    return rows


def _json_rows(table: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except ValueError as error:
            raise UserError(f"{table}, line {line} is not JSON: {error}.") from None
        if not isinstance(row, dict):
            raise UserError(f'{table}, line {line} is not an object such as {{"{FILE_COLUMN}": ..., "text": ...}}.')
        yield line, {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}


def _csv_rows(table: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{table}, line {reader.line_num} has another number of columns than the first line.")
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{table}, line {reader.line_num} is not CSV: {error}.") from None
