"""Data sets of images with a caption, a class, or neither; the registry of their formats."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Protocol

import erasediff.data.sources
from erasediff.data.hf_datasets import class_label_names, is_saved_dataset, read_images
from erasediff.data.image_folder import CLASS, CaptionedImage, filled
from erasediff.errors import UserError


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
    """

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


def read_image_set(location: str, options: ReadOptions) -> ImageSet:
    """List the images of a data set of any format: the first of ``sources`` that reads it, or one of ``read_images``.

    Raises:
        UserError: As the format's ``read``, and for images without captions where they are needed.
    """
    for source in sources():
        if source.reads(location):
            found = source.read(location, options)
            return found if not options.captions else ImageSet(_captioned(found.images, options), found.class_names)
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
    if not names and found and _are_numbers(images, column, found):
        names = [str(number) for number in range(max(map(int, found)) + 1)]
    names = tuple(names) or tuple(sorted(found))
    numbers = {name: number for number, name in enumerate(names)}
    numbered = [replace(image, label=numbers.get(image.attributes.get(column, ""))) for image in images]
    return ImageSet(numbered, names)


def _are_numbers(images: Sequence[CaptionedImage], column: str, found: set[str]) -> bool:
    """Whether the classes are whole numbers that metadata give, and not the names of folders."""
    if not all(name.isascii() and name.isdecimal() and str(int(name)) == name for name in found):
        return False
    return any(image.attributes.get(column) != image.path.parent.name for image in images)


def _captioned(images: Sequence[CaptionedImage], options: ReadOptions) -> list[CaptionedImage]:
    if options.template is None:
        raise UserError("These data have no captions: give a caption template, such as 'a photo of a {class}'.")
    return [replace(image, caption=filled(options.template, image.attributes)) for image in images]
