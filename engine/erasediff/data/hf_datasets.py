"""Hugging Face data sets, on the disk or on the hub, through the optional ``datasets`` library."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from erasediff.data.folder_listing import UNREAD_METADATA, missing_folder
from erasediff.data.image_folder import (
    CLASS,
    LARGEST_IMAGE,
    CaptionedImage,
    check_caption_column,
    check_captions,
    filled,
    read_captioned_images,
)
from erasediff.data.metadata import MetadataRow
from erasediff.errors import UserError
from erasediff.io.user_file import read_bytes

SAVED = ("state.json", "dataset_dict.json")
DEFAULT_SPLIT = "train"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_images(
    source: str,
    *,
    split: str = DEFAULT_SPLIT,
    caption_column: str | None = None,
    template: str | None = None,
    captions: bool = True,
) -> list[CaptionedImage]:
    """List the images of ``source``: an image folder, a saved Hugging Face data set, or the name of one on the hub.

    The hub is asked for names of the form owner/name alone, and not where the owner is a folder here.

    Raises:
        UserError: for a folder that does not exist, and as ``read_captioned_images`` and ``read_dataset``.
    """
    check_source(source)
    folder = Path(source)
    if folder.is_dir() and not is_saved_dataset(folder):
        return read_captioned_images(folder, caption_column=caption_column, template=template, captions=captions)
    return read_dataset(source, split=split, caption_column=caption_column, template=template, captions=captions)


def check_source(source: str) -> None:
    """UserError for neither a folder nor what may be the name of a data set on the hub, which is not asked for it."""
    folder = Path(source)
    on_hub = HUB_NAME.fullmatch(source) is not None and not folder.parent.exists()
    if not folder.is_dir() and not on_hub:
        raise UserError(missing_folder(folder))


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``folder`` was written by ``Dataset.save_to_disk``, or holds parquet files."""
    parquet = [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]
    parquet = [file for file in parquet if file.name != UNREAD_METADATA]
    return bool(parquet) or any((folder / name).is_file() for name in SAVED)


def read_dataset(
    source: str,
    *,
    split: str = DEFAULT_SPLIT,
    image_column: str | None = None,
    caption_column: str | None = None,
    template: str | None = None,
    captions: bool = True,
) -> list[CaptionedImage]:
    """List the images of a Hugging Face data set.

    Nothing is decoded or copied; an image's bytes are read when it is opened. Class labels become attributes by their
    names, the one called ``label`` also as ``"class"``.

    Args:
        source: a folder of ``save_to_disk`` or of parquet files, or a name on the hub.
        split: of the data set.
        image_column: None for the first column of images.
        caption_column: as in ``read_captioned_images``.
        template: as in ``read_captioned_images``.
        captions: as in ``read_captioned_images``.

    Raises:
        UserError: if ``datasets`` is not installed, the hub cannot be reached, there is no such data set or split, or a
            column is missing.
    """
    library = _library()
    rows = _loaded(library, source, split)
    features: Mapping[str, Any] = rows.features
    images = [name for name, kind in features.items() if isinstance(kind, library.Image)]
    if not images or image_column not in (None, *images):
        raise UserError(f"The data set {source} has no image column {image_column or ''}: it has {_listed(features)}.")
    image_column = image_column or images[0]
    texts = [name for name, kind in features.items() if _is_text(kind)]
    check_caption_column(texts, caption_column, source)
    rows = rows.cast_column(image_column, library.Image(decode=False))

    kept = [name for name, kind in features.items() if _is_text(kind) or _is_class(kind)]
    described = rows.select_columns(kept) if kept else itertools.repeat({}, len(rows))
    result = []
    for number, row in enumerate(described):
        columns = {name: _named_value(features[name], value) for name, value in row.items()}
        name = Path(f"{source}/{split}/{number}")
        row_captions, attributes = MetadataRow(str(name), columns).captions_and_attributes(caption_column)
        if "label" in attributes:
            attributes.setdefault(CLASS, attributes["label"])
        caption, *others = row_captions or (filled(template, attributes),)
        stored = _stored(rows, image_column, number)
        result.append(CaptionedImage(name, caption, number, attributes, stored, other_captions=tuple(others)))
    if captions:
        check_captions(result, "name the column with captions")
    return result


def class_label_names(source: str, *, split: str = DEFAULT_SPLIT, column: str = CLASS) -> tuple[str, ...]:
    """Names of the classes of a Hugging Face data set in the order of its ClassLabel ``column``; () without one.

    The column ``label`` stands for ``class``, as in ``read_dataset``.
    """
    features: Mapping[str, Any] = _loaded(_library(), source, split).features
    name = "label" if column == CLASS and CLASS not in features else column
    return tuple(features[name].names) if name in features and _is_class(features[name]) else ()


def _stored(rows: Any, column: str, number: int) -> Callable[[], bytes]:
    def read() -> bytes:
        image = rows[number][column]
        if image is None:
            raise OSError("its row holds no image")
        content: bytes | None = image["bytes"]
        return read_bytes(Path(image["path"]), LARGEST_IMAGE) if content is None else content

    return read


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise UserError('Reading a Hugging Face data set needs pip install "erasediff[datasets]".') from None


def _loaded(library: Any, source: str, split: str) -> Any:
    folder = Path(source)
    try:
        if any((folder / name).is_file() for name in SAVED):
            saved = library.load_from_disk(source)
            if not isinstance(saved, Mapping):
                return saved
            if split not in saved:
                raise ValueError(f"it has {_listed(saved)}")
            return saved[split]
        return library.load_dataset(source, split=split)
    except ValueError as error:
        raise UserError(f"The data set {source} has no split {split!r}: {_first_line(error)}") from error
    except (ConnectionError, OSError) as error:
        raise UserError(
            f"The data set {source} is neither a folder here nor can it be had from the hub: {_first_line(error)}"
        ) from error


def _is_text(feature: Any) -> bool:
    """Whether a column holds texts or lists of texts."""
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _named_value(feature: Any, value: Any) -> Any:
    """A text, a list of texts, or the name of a class; None for a missing one, which data sets number -1."""
    if not _is_class(feature) or value is None:
        return value
    return feature.int2str(value) if value >= 0 else None


def _is_class(feature: Any) -> bool:
    return hasattr(feature, "int2str")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
