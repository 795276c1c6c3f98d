"""Captions, attributes and classes of images in shards and tables, by the rules of an image folder's metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from erasediff.data.image_folder import check_caption_column, check_captions, filled
from erasediff.data.image_table import ImageRows, ImageTable
from erasediff.data.metadata import MetadataRow
from erasediff.data.sources.base import ImageSet, ReadOptions, class_list
from erasediff.data.sources.table_cache import cached_table
from erasediff.errors import UserError

FORMAT = 1
CLASS_NAMES = b"class_names"
CACHED_FROM = 20_000
"""Images whose descriptions take longer to put together than to read."""


class Descriptions:
    """Descriptions of the images of a data set, image by image.

    Args:
        location: The data set, for messages.
        options: How captions and classes are chosen.
    """

    def __init__(self, location: str, options: ReadOptions) -> None:
        self._location = location
        self._options = options
        self._rows = ImageRows()
        self._columns: set[str] = set()
        self._codes: dict[str | None, int] = {None: -1}
        self._classes: list[int] = []
        self._are_folders = True

    def append(
        self,
        file: int,
        name: str,
        columns: Mapping[str, Any],
        *,
        place: str,
        texts: Sequence[str] = (),
        attributes: Mapping[str, str] | None = None,
        folder_class: bool = False,
    ) -> None:
        """Add an image.

        Args:
            file: Number of the file that holds it.
            name: Its name there.
            columns: Its metadata.
            place: Where the metadata are, for messages.
            texts: Captions for want of any in the metadata.
            attributes: Attributes that the metadata may replace.
            folder_class: Whether the class among ``attributes`` is the name of a folder.

        Raises:
            UserError: For a caption that is no text, and a template that cannot be filled.
        """
        options, own = self._options, dict(attributes or {})
        captions: Sequence[str] = ()
        if columns:
            self._columns.update(columns)
            captions, given = MetadataRow(place, columns).captions_and_attributes(options.caption_column)
            folder_class = folder_class and options.class_column not in given
            own |= given
        captions = captions or texts
        if not captions and options.template is not None:
            captions = (filled(options.template, own),)
        self._rows.append(file, name, captions, own)
        kind = own.get(options.class_column)
        self._are_folders = self._are_folders and (kind is None or folder_class)
        self._classes.append(self._codes.setdefault(kind, len(self._codes) - 1))

    def table(self, names: Sequence[str]) -> pa.Table:
        """Table of the images, with the names of their classes by number in its schema's metadata.

        Args:
            names: Names of the classes by their numbers; () for those that occur.

        Raises:
            UserError: For no images, and a caption column that there is not.
        """
        if not self._classes:
            raise UserError(f"There are no images in {self._location}.")
        check_caption_column(self._columns, self._options.caption_column, self._location)
        found = [kind for kind in self._codes if kind is not None]
        names = tuple(names) or class_list(found, are_folders=self._are_folders)
        numbers = {name: number for number, name in enumerate(names)}
        labels = np.array([*(numbers.get(kind, -1) for kind in found), -1], np.int32)[self._classes]
        return self._rows.table(labels).replace_schema_metadata({CLASS_NAMES: json.dumps(names)})


def described_images(
    location: str,
    files: Sequence[Path],
    options: ReadOptions,
    describe: Callable[[Descriptions], Sequence[str]],
    read: Callable[[int], bytes],
    remedy: str,
) -> ImageSet:
    """Image set of files, whose descriptions are kept in the cache if there are many.

    Args:
        location: The data set, for messages.
        files: Paths of the files.
        options: How captions and classes are chosen.
        describe: Adds every image, and returns the names of the classes or ().
        read: Reads the image of a row.
        remedy: What to do about an image without a caption.

    Raises:
        UserError: As ``describe`` and ``Descriptions.table``; for images without captions where they are needed.
    """

    def make() -> pa.Table:
        descriptions = Descriptions(location, options)
        names = describe(descriptions)
        return descriptions.table(names)

    settings = [FORMAT, options.caption_column, options.template, options.class_column]
    table = cached_table("descriptions", files, settings, make, least=CACHED_FROM)
    images = ImageTable(table.replace_schema_metadata(None), files, read)
    if options.captions:
        check_captions(images.uncaptioned(), remedy)
    return ImageSet(images, tuple(json.loads(table.schema.metadata[CLASS_NAMES])))
