"""Folders of captioned images: captions come from metadata files, text files or a template."""

from __future__ import annotations

import csv
import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from erasediff.data.preprocessing import IMAGE_SUFFIXES
from erasediff.errors import UserError

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
FILE_COLUMN = "file_name"
CAPTION_COLUMNS = ("text", "caption", "prompt")
CLASS = "class"

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image that has not been read yet.

    Attributes:
        path: of its file, or its name in a data set.
        caption: the prompt that describes it.
        id: its number in its data set.
        attributes: the other columns of its metadata as text; ``"class"`` is its subfolder unless a column has that
            name.
        stored: reads the file's bytes where they are not at ``path``.
        label: the number of its class, where the classes of its data set are numbered.
    """

    path: Path
    caption: str
    id: int
    attributes: Mapping[str, str] = field(default_factory=dict)
    stored: Callable[[], bytes] | None = None
    label: int | None = None

    def read(self) -> bytes:
        """The bytes of the image file. UserError if it cannot be read."""
        try:
            return self.path.read_bytes() if self.stored is None else self.stored()
        except OSError as error:
            raise UserError(f"Cannot read the image {self.path}: {error.strerror or error}.") from error


def read_captioned_images(
    folder: Path, *, caption_column: str | None = None, template: str | None = None, captions: bool = True
) -> list[CaptionedImage]:
    """List the images in ``folder`` and its subfolders, in the order of their paths.

    An image's caption is in the metadata file, else in a ``.txt`` file beside it, else it is the filled template.

    Args:
        folder: of images.
        caption_column: of the metadata; None for ``text``, ``caption`` or ``prompt``.
        template: a format string of the image's attributes, such as "a photo of a {class}".
        captions: whether each image needs a caption.

    Raises:
        UserError: for a folder without images, images without captions, and metadata that cannot be read.
    """
    paths = _image_files(folder)
    rows = read_metadata(folder)
    column = caption_column_of({name for row in rows.values() for name in row}, caption_column, folder)
    images = []
    for number, path in enumerate(paths):
        subfolder = {} if path.parent == folder else {CLASS: path.parent.relative_to(folder).as_posix()}
        attributes = {**subfolder, **rows.get(path, {})}
        caption = attributes.pop(column, "") if column else ""
        caption = caption.strip() or _text_beside(path) or filled(template, attributes)
        images.append(CaptionedImage(path, caption, number, attributes))
    if captions:
        check_captions(images, "give it a row in metadata.jsonl or a .txt file beside it")
    return images


def caption_column_of(columns: Iterable[str], requested: str | None, source: object) -> str | None:
    """The column with captions: ``requested``, or the first usual one, or None. UserError if it is not there."""
    columns = sorted(columns)
    if requested is None:
        return next((name for name in CAPTION_COLUMNS if name in columns), None)
    if requested not in columns:
        near = difflib.get_close_matches(requested, columns) or columns
        raise UserError(f"{source} has no column {requested!r} with captions: choose from {', '.join(near) or 'none'}.")
    return requested


def filled(template: str | None, attributes: Mapping[str, str]) -> str:
    """``template`` with ``{name}`` replaced by attributes; "" for None. UserError for a name that is no attribute."""
    try:
        return (template or "").format_map(attributes)
    except (KeyError, ValueError, IndexError):
        raise UserError(
            f"The caption template {template!r} cannot be filled: write {', '.join(f'{{{a}}}' for a in attributes)} "
            "where the image's attribute belongs."
        ) from None


def check_captions(images: list[CaptionedImage], remedy: str) -> None:
    """UserError that names the first image without a caption, and counts the others."""
    missing = [image.path for image in images if not image.caption]
    if missing:
        others = f" and {len(missing) - 1} more have" if len(missing) > 1 else " has"
        raise UserError(f"{missing[0]}{others} no caption: {remedy}, or give a caption template.")


def read_metadata(folder: Path) -> dict[Path, Row]:
    """Rows of the folder's ``metadata.jsonl`` or ``metadata.csv``.

    Returns:
        The other columns of each row as text, by the image file that it names; {} without a metadata file.

    Raises:
        UserError: for two metadata files, a line that cannot be read, a row without or with another row's
            ``file_name``, and a file that does not exist.
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


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    paths = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
    ]
    if not paths:
        raise UserError(f"There are no images in {folder}: it needs files such as {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return sorted(paths)


def _text_beside(path: Path) -> str:
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise UserError(f"{path.with_suffix('.txt')} is not UTF-8 text: save it in that encoding.") from None
