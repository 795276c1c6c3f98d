"""Lists of images that are rows of an Arrow table: a million of them in the memory of their texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from erasediff.data.image_folder import CLASS, CaptionedImage
from erasediff.data.labelled_images import UNLABELLED, NumberedImages

FILE, NAME, CAPTION, OTHER_CAPTIONS = "file", "name", "caption", "other_captions"
ATTRIBUTES, LABEL = "attributes", "label"
SCHEMA = pa.schema(
    {
        FILE: pa.int32(),
        NAME: pa.large_string(),
        CAPTION: pa.large_string(),
        OTHER_CAPTIONS: pa.large_string(),
        ATTRIBUTES: pa.large_string(),
        LABEL: pa.int32(),
    }
)
"""Columns of a table of images: the number of the file that an image is in, its name there, its caption or "", further
captions and its attributes as JSON or null, and the number of its class or null."""
WITHOUT_LABEL = pa.schema([field for field in SCHEMA if field.name != LABEL])
MADE_AT_ONCE = 4096


class ImageTable(NumberedImages):
    """Images described by the rows of a table, each made when it is asked for.

    Args:
        table: Columns of ``SCHEMA``; the id of an image is the number of its row.
        files: Paths of the files that hold the images, by their numbers.
        read: Reads the image file of a row.
        numbers: int64 [N], the rows in this list; None for all.
    """

    def __init__(
        self,
        table: pa.Table,
        files: Sequence[Path],
        read: Callable[[int], bytes],
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        self._table = table
        self._files = files
        self._read = read
        self.labels = table.column(LABEL).fill_null(UNLABELLED).to_numpy()
        self.numbers = np.arange(table.num_rows) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> CaptionedImage: ...
    @overload
    def __getitem__(self, index: slice) -> ImageTable: ...
    def __getitem__(self, index: int | slice) -> CaptionedImage | ImageTable:
        if isinstance(index, slice):
            return self.at(self.numbers[index])
        return next(self._made(self.numbers[[index]]))

    def __iter__(self) -> Iterator[CaptionedImage]:
        for first in range(0, len(self.numbers), MADE_AT_ONCE):
            yield from self._made(self.numbers[first : first + MADE_AT_ONCE])

    def captions_by_id(self) -> Iterator[tuple[int, list[str]]]:
        """The id and the captions of each image, in half the time that it takes to make the images."""
        for first in range(0, len(self.numbers), MADE_AT_ONCE):
            rows = self.numbers[first : first + MADE_AT_ONCE]
            columns = self._table.select([CAPTION, OTHER_CAPTIONS]).take(pa.array(rows)).to_pydict()
            for number, caption, others in zip(rows.tolist(), *columns.values(), strict=True):
                yield number, [caption, *(json.loads(others) if others else ())]

    def outlines(self) -> Iterator[tuple[str, str, str]]:
        """(path, caption, class) of each image, without making it."""
        for first in range(0, len(self.numbers), MADE_AT_ONCE):
            rows = self._table.select([FILE, NAME, CAPTION, ATTRIBUTES])
            columns = rows.take(pa.array(self.numbers[first : first + MADE_AT_ONCE])).to_pydict()
            for file, name, caption, attributes in zip(*columns.values(), strict=True):
                yield (
                    f"{self._files[file]}/{name}",
                    caption,
                    json.loads(attributes).get(CLASS, "") if attributes else "",
                )

    def named(self, is_wanted: Callable[[str], bool]) -> ImageTable:
        """Those whose names, without the folders before them, are wanted."""
        names = self._table.column(NAME)
        chosen = np.empty(len(self), bool)
        for first in range(0, len(self.numbers), MADE_AT_ONCE):
            found = names.take(pa.array(self.numbers[first : first + MADE_AT_ONCE])).to_pylist()
            chosen[first : first + MADE_AT_ONCE] = [is_wanted(name.rpartition("/")[2]) for name in found]
        return self.at(self.numbers[chosen])

    def at(self, numbers: NDArray[np.int64]) -> ImageTable:
        """Those with some ids, in the order of ``numbers``."""
        return ImageTable(self._table, self._files, self._read, numbers)

    def uncaptioned(self) -> ImageTable:
        """The images without a caption."""
        lengths = np.asarray(pc.binary_length(self._table.column(CAPTION)))
        return self.at(self.numbers[lengths[self.numbers] == 0])

    def _made(self, rows: NDArray[np.int64]) -> Iterator[CaptionedImage]:
        columns = self._table.take(pa.array(rows)).to_pydict()
        for number, file, name, caption, others, attributes, label in zip(
            rows.tolist(), *(columns[name] for name in SCHEMA.names), strict=True
        ):
            yield CaptionedImage(
                self._files[file] / name,
                caption,
                number,
                json.loads(attributes) if attributes else {},
                partial(self._read, number),
                label,
                tuple(json.loads(others)) if others else (),
            )


class ImageRows:
    """Table of ``SCHEMA`` that is put together image by image, in little more memory than it has in the end."""

    def __init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._pending: list[tuple[int, str, str, str | None, str | None]] = []

    def append(self, file: int, name: str, captions: Sequence[str], attributes: Mapping[str, str]) -> None:
        """Add an image with any number of captions; ``file`` and ``name`` are as in ``SCHEMA``."""
        caption, others = captions[0] if captions else "", captions[1:]
        self._pending.append(
            (
                file,
                name,
                caption,
                json.dumps(others) if others else None,
                json.dumps(attributes) if attributes else None,
            )
        )
        if len(self._pending) == MADE_AT_ONCE:
            self._flush()

    def table(self, labels: NDArray[np.int32]) -> pa.Table:
        """The table, with the number of each image's class, or -1."""
        self._flush()
        rows = pa.Table.from_batches(self._batches, WITHOUT_LABEL).combine_chunks()
        return rows.append_column(SCHEMA.field(LABEL), pa.array(labels, mask=labels < 0))

    def _flush(self) -> None:
        if self._pending:
            columns = zip(*self._pending, strict=True)
            arrays = [pa.array(column, kind) for column, kind in zip(columns, WITHOUT_LABEL.types, strict=True)]
            self._batches.append(pa.record_batch(arrays, schema=WITHOUT_LABEL))
            self._pending.clear()


def _json(value: Sequence[str] | Mapping[str, str]) -> str | None:
    return json.dumps(value) if value else None
