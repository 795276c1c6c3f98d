"""Folders of captioned images: captions come from metadata files, text files or a template."""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from erasediff.data.folder_listing import FolderListing, ImageFile, list_folder
from erasediff.data.metadata import MetadataRow, read_metadata
from erasediff.errors import UserError
from erasediff.io.user_file import MEGABYTE, read_bytes, read_text

CLASS = "class"
LARGEST_IMAGE = 1000 * MEGABYTE
LARGEST_CAPTION = MEGABYTE


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image that has not been read yet.

    Attributes:
        path: of its file, or its name in a data set.
        caption: the prompt that describes it, with which it is trained.
        id: its number in its data set.
        attributes: the other columns of its metadata as text; ``"class"`` is its subfolder unless a column has that
            name.
        stored: reads the file's bytes where they are not at ``path``.
        label: the number of its class, where the classes of its data set are numbered.
        other_captions: further captions, by which it may be selected.
        links: the same file under other paths, with what their folders say of it.
        selected_by: what asks to forget it: pairs such as ("phrase", "sneaker").
    """

    path: Path
    caption: str
    id: int
    attributes: Mapping[str, str] = field(default_factory=dict)
    stored: Callable[[], bytes] | None = None
    label: int | None = None
    other_captions: tuple[str, ...] = ()
    links: tuple[CaptionedImage, ...] = ()
    selected_by: tuple[tuple[str, str], ...] = ()

    def read(self) -> bytes:
        """The bytes of the image file. UserError if it cannot be read."""
        try:
            return read_bytes(self.path, LARGEST_IMAGE) if self.stored is None else self.stored()
        except OSError as error:
            raise UserError(f"Cannot read the image {self.path}: {error.strerror or error}.") from error

    def names(self) -> tuple[CaptionedImage, ...]:
        """The image under each of its paths."""
        return (self, *self.links)

    def captions(self) -> Iterator[str]:
        """Every caption, under each of its paths."""
        for image in self.names():
            yield image.caption
            yield from image.other_captions


def read_captioned_images(
    folder: Path, *, caption_column: str | None = None, template: str | None = None, captions: bool = True
) -> list[CaptionedImage]:
    """List the images in ``folder`` and its subfolders, in the order of their paths.

    An image's caption is in the metadata file of its folder or of one above, else in a ``.txt`` file beside it, else it
    is the filled template. Of several captions the first is trained. A file with several paths is one image.

    Args:
        folder: of images.
        caption_column: of the metadata; None for ``text``, ``caption`` or ``prompt``.
        template: a format string of the image's attributes, such as "a photo of a {class}".
        captions: whether each image needs a caption.

    Raises:
        UserError: for a folder without images, images that cannot be read or have no captions, and metadata that cannot
            be read or names no image.
    """
    listing = list_folder(folder)
    rows = read_metadata(listing, folder)
    check_caption_column({name for row in rows.values() for name in row.columns}, caption_column, folder)

    @cache
    def class_of(parent: str) -> dict[str, str]:
        name = Path(parent).relative_to(folder).as_posix()
        return {} if name == "." else {CLASS: name}

    files: defaultdict[tuple[int, int], list[ImageFile]] = defaultdict(list)
    for file in sorted(listing.images, key=lambda file: file.is_link):
        files[file.identity].append(file)
    images = []
    for number, same in enumerate(sorted(files.values(), key=lambda same: same[0].path)):
        image, *links = (
            _described(
                file.path,
                number,
                class_of(os.path.dirname(file.path)),
                listing,
                rows.get(file.path) if rows else None,
                caption_column,
                template,
            )
            for file in same
        )
        caption = next((name.caption for name in (image, *links) if name.caption), "")
        images.append(replace(image, caption=caption, links=tuple(links)) if links else image)
    if captions:
        check_captions(images, "give it a row in metadata.jsonl or a .txt file beside it")
    return images


def _described(
    path: Path,
    number: int,
    attributes: Mapping[str, str],
    listing: FolderListing,
    row: MetadataRow | None,
    caption_column: str | None,
    template: str | None,
) -> CaptionedImage:
    captions: Sequence[str] = ()
    if row is not None:
        captions, columns = row.captions_and_attributes(caption_column)
        attributes = {**attributes, **columns}
    captions = captions or [text for file in listing.texts_beside(path) if (text := _text(file))]
    captions = captions or [filled(template, attributes)]
    return CaptionedImage(path, captions[0], number, attributes, other_captions=tuple(captions[1:]))


def check_caption_column(columns: Iterable[str], requested: str | None, source: object) -> None:
    """UserError if captions are to be in a column that is not there."""
    columns = sorted(columns)
    if requested is not None and requested not in columns:
        near = difflib.get_close_matches(requested, columns) or columns
        raise UserError(f"{source} has no column {requested!r} with captions: choose from {', '.join(near) or 'none'}.")


def filled(template: str | None, attributes: Mapping[str, str]) -> str:
    """``template`` with ``{name}`` replaced by attributes; "" for None. UserError for a name that is no attribute."""
    try:
        return (template or "").format_map(attributes)
    except (KeyError, ValueError, IndexError, AttributeError):
        raise UserError(
            f"The caption template {template!r} cannot be filled: write {', '.join(f'{{{a}}}' for a in attributes)} "
            "where the image's attribute belongs."
        ) from None


def check_captions(images: Sequence[CaptionedImage], remedy: str) -> None:
    """UserError that names the first image without a caption, and counts the others."""
    missing = [image.path for image in images if not image.caption]
    if missing:
        others = f" and {len(missing) - 1} more have" if len(missing) > 1 else " has"
        raise UserError(f"{missing[0]}{others} no caption: {remedy}, or give a caption template.")


def _text(file: Path) -> str:
    try:
        return read_text(file, LARGEST_CAPTION).strip()
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it in that encoding.") from None
    except OSError as error:
        raise UserError(f"Cannot read the caption file {file}: {error.strerror}.") from error
