"""Data sets of images with a caption, a class, or neither; the registry of their formats."""

from __future__ import annotations

import pkgutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Protocol

import erasediff.data.sources
from erasediff.data.hf_datasets import check_source, class_label_names, is_saved_dataset, read_images
from erasediff.data.image_folder import CLASS, CaptionedImage, filled
from erasediff.errors import UserError
from erasediff.utils.collector import paused_collector

MOST_NUMBERED = 100_000
"""Classes that are numbered by the numbers they are called; larger ones are identifiers."""


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images that have not been read yet, and the names of their classes by number; () for a set without classes."""

    images: Sequence[CaptionedImage]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """Options of reading a data set; a format uses those that it has a use for.

    Attributes:
        split: Part of the data set, such as "train" or "test".
        caption_column: See ``read_captioned_images``.
        template: See ``read_captioned_images``.
        class_column: Attribute that holds the name of an image's class.
        captions: Whether each image needs a caption.
    """

    split: str = "train"
    caption_column: str | None = None
    template: str | None = None
    class_column: str = CLASS
    captions: bool = False


class Source(Protocol):
    """A format of data sets, the ``SOURCE`` of a module of ``erasediff.data.sources``.

    Its images are ``CaptionedImage``s, whose bytes are read when they are needed: the list of a large data set is to
    be a lazy sequence.

    Attributes:
        has_captions: Whether its images may have captions; ``read`` then sees to it that those asked for are there.
    """

    has_captions: bool

    def reads(self, location: str) -> bool:
        """Return true if ``location``, a path or a name, is a data set of this format; without reading much of it."""

    def read(self, location: str, options: ReadOptions) -> ImageSet:
        """List the images of ``location``. UserError for a data set that is damaged or lacks what is asked for."""


@cache
def sources() -> tuple[Source, ...]:
    """All formats but image folders and Hugging Face data sets, in the order of their modules' names."""
    package = erasediff.data.sources
    modules = [import_module(f"{package.__name__}.{entry.name}") for entry in pkgutil.iter_modules(package.__path__)]
    return tuple(module.SOURCE for module in modules if hasattr(module, "SOURCE"))


def check_location(location: str) -> None:
    """UserError for what is neither of any format nor may be the name of a data set on the hub."""
    if not any(source.reads(location) for source in sources()):
        check_source(location)


def read_image_set(location: str, options: ReadOptions) -> ImageSet:
    """List the images of a data set of any format: the first of ``sources`` that reads it, or one of ``read_images``.

    Raises:
        UserError: As the format's ``read``, and for images without captions where they are needed.
    """
    with paused_collector():
        return _read_image_set(location, options)


def _read_image_set(location: str, options: ReadOptions) -> ImageSet:
    for source in sources():
        if source.reads(location):
            found = source.read(location, options)
            if not options.captions or source.has_captions:
                return found
            return ImageSet(_captioned(found.images, options), found.class_names)
    images = read_images(
        location,
        split=options.split,
        caption_column=options.caption_column,
        template=options.template,
        captions=options.captions,
    )
    folder = Path(location)
    if folder.is_dir() and not is_saved_dataset(folder):
        return labelled(images, options.class_column)
    names = class_label_names(location, split=options.split, column=options.class_column)
    return labelled(images, options.class_column, names)


def labelled(images: Sequence[CaptionedImage], column: str = CLASS, names: Sequence[str] = ()) -> ImageSet:
    """Number the classes of ``images``.

    Args:
        images: Images whose attribute ``column``, where they have it, is the name of their class.
        column: Name of the attribute.
        names: Names of the classes in their order. Without them, whole numbers in a column of metadata are the classes'
            own numbers, and other names are numbered in alphabetical order, as torchvision's ImageFolder does.
    """
    found = {image.attributes[column] for image in images if column in image.attributes}
    are_folders = all(image.attributes.get(column) == image.path.parent.name for image in images)
    names = tuple(names) or class_list(found, are_folders=are_folders)
    numbers = {name: number for number, name in enumerate(names)}
    numbered = [replace(image, label=numbers.get(image.attributes.get(column, ""))) for image in images]
    return ImageSet(numbered, names)


def class_list(found: Collection[str], *, are_folders: bool) -> tuple[str, ...]:
    """Names of classes by number: in alphabetical order, as torchvision's ImageFolder has them.

    Whole numbers are the classes' own, unless folders are called so, or they are far too large to number classes.

    Args:
        found: The classes that occur.
        are_folders: Whether all are names of the images' folders.
    """
    are_numbers = all(name.isascii() and name.isdecimal() and str(int(name)) == name for name in found)
    if not found or are_folders or not are_numbers or (count := max(map(int, found)) + 1) > MOST_NUMBERED:
        return tuple(sorted(found))
    return tuple(map(str, range(count)))


def _captioned(images: Sequence[CaptionedImage], options: ReadOptions) -> list[CaptionedImage]:
    if options.template is None:
        raise UserError("These data have no captions: give a caption template, such as 'a photo of a {class}'.")
    return [replace(image, caption=filled(options.template, image.attributes)) for image in images]
