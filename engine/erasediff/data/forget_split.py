"""Forget and retain sets: split images by files, classes, or phrases of their captions."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from erasediff.data.class_names import several_hint
from erasediff.data.digits import Images
from erasediff.data.image_folder import CLASS, CaptionedImage
from erasediff.data.image_table import ImageTable
from erasediff.data.labelled_images import LabelledImages, NumberedImages
from erasediff.data.path_index import PathIndex, name_form, near, spellings
from erasediff.data.phrases import contains_phrase, normal_form, words_of
from erasediff.errors import UserError
from erasediff.io.json_file import parse_json
from erasediff.io.user_file import read_text

SHOWN = 3
Request = tuple[str, str]
"""A way to ask for images and what was asked for, such as ("phrase", "sneaker")."""
Selected = Mapping[int, Sequence[Request]]
"""What asks to forget an image, by the image's id."""


class Partition(NamedTuple):
    """Images to forget and images to retain, each in the order of their data set."""

    forget: list[CaptionedImage]
    retain: Sequence[CaptionedImage]


def forget_files(images: Sequence[CaptionedImage], request: Path) -> Partition:
    """Forget the images listed in a deletion request. See ``select_files``."""
    return partition(images, select_files(images, request))


def forget_classes(images: Sequence[CaptionedImage], classes: Iterable[str], column: str = CLASS) -> Partition:
    """Forget the images of some classes. See ``select_classes``."""
    return partition(images, select_classes(images, classes, column))


def forget_phrases(images: Sequence[CaptionedImage], phrases: Iterable[str]) -> Partition:
    """Forget the images whose captions contain phrases. See ``select_phrases``."""
    return partition(images, select_phrases(images, phrases))


def partition(images: Sequence[CaptionedImage], *selections: Selected) -> Partition:
    """Split ``images`` into those of any of the selections, which say so in ``selected_by``, and all others."""
    requests: defaultdict[int, list[Request]] = defaultdict(list)
    for selection in selections:
        for number, found in selection.items():
            requests[number].extend(found)
    if isinstance(images, NumberedImages):
        is_asked = np.isin(images.numbers, list(requests))
        asked, retain = images.at(images.numbers[is_asked]), images.at(images.numbers[~is_asked])
        return Partition(_selected_by(asked, requests), retain)
    return Partition(
        _selected_by((i for i in images if i.id in requests), requests), [i for i in images if i.id not in requests]
    )


def _selected_by(images: Iterable[CaptionedImage], requests: Selected) -> list[CaptionedImage]:
    """``images``, which say what asks to forget them."""
    return [replace(image, selected_by=(*image.selected_by, *requests[image.id])) for image in images]


def select_files(images: Sequence[CaptionedImage], request: Path) -> Selected:
    """Select the images listed in a deletion request.

    Args:
        images: the data set.
        request: a text file with one path per line; blank lines and those that begin with # do not count. A path may
            be absolute or the end of an image's path, its name alone if no other image has it; of an image in a shard
            or table, its name there, or its key. Spaces and quotes around it do not count, a backslash is a slash.

    Raises:
        UserError: for a request that cannot be read or is empty, and a path of no image or of several.
    """
    try:
        lines = read_text(request).split("\n")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"Cannot read the list of files to forget, {request}: give a UTF-8 text file.") from None
    index, are_members = _index_of(images, lines), len(images) > 0 and images[0].stored is not None
    selected: defaultdict[int, list[Request]] = defaultdict(list)
    for line in lines:
        path = line.strip()
        if not path:
            continue
        found = _listed_images(index, line, are_members=are_members)
        if not found and path.startswith("#"):
            continue
        if not found:
            every = PathIndex((name.path, image.id) for image in images for name in image.names())
            raise UserError(f"{request}: {_no_such_image(every, path)}.")
        if len(found) > 1:
            raise UserError(
                f"{request}: {path} may be any of {len(found)} images; write more of its path, or all of it."
            )
        selected[found[0]].append(("file", path))
    if not selected:
        raise UserError(f"The list of files to forget, {request}, is empty: write one path per line.")
    return selected


def _index_of(images: Sequence[CaptionedImage], lines: Sequence[str]) -> PathIndex[int]:
    """Ids of those images that ``lines`` may name: an index of all of a million takes half a minute.

    An image in a shard has its key, its name up to the first dot, as a second name.
    """
    paths = [path for line in lines for path in spellings(line) if path and "\0" not in path]
    wanted = {
        name_form(os.path.basename(os.path.normpath(spelt)))
        for path in paths
        for spelt in (path, os.path.realpath(path))
    }

    def is_wanted(name: str) -> bool:
        return name_form(name) in wanted or name_form(name.partition(".")[0]) in wanted

    found = []
    for image in images.named(is_wanted) if isinstance(images, ImageTable) else images:
        for path in (name.path for name in image.names() if is_wanted(name.path.name)):
            found.append((path, image.id))
            if image.stored is not None and (key := path.name.partition(".")[0]):
                found.append((path.with_name(key), image.id))
    return PathIndex(found)


def _listed_images(index: PathIndex[int], line: str, *, are_members: bool) -> list[int]:
    """Ids of the images that a line may name.

    Args:
        index: The images.
        line: A line of the request.
        are_members: Whether the images are within files, so that an absolute path may be a name there.
    """
    for path in spellings(line):
        # A name alone is looked for everywhere, not in the working folder first.
        exact = index.at(path) if "/" in path else None
        found = [exact] if exact is not None else index.ending_with(path.lstrip("/") if are_members else path)
        if found:
            return list(dict.fromkeys(found))
    return []


def _no_such_image(index: PathIndex[int], path: str) -> str:
    within = index.in_folder(path)
    if within:
        return f"{path} is a folder of {within} images; list its files, or forget it by --forget-class"
    similar = index.near(path)
    suggestion = f" (did you mean {' or '.join(similar)}?)" if similar else ""
    return f"{path} is no image of the data{suggestion}; remove it or correct the path"


def select_classes(images: Sequence[CaptionedImage], classes: Iterable[str], column: str = CLASS) -> Selected:
    """Select the images whose attribute ``column`` is one of ``classes``, or a list with one of them.

    A class that is a folder has the images of its subfolders too.

    Raises:
        UserError: for a class of no image.
    """
    by_class: defaultdict[str, list[int]] = defaultdict(list)
    if isinstance(images, LabelledImages) and column == CLASS:
        for label, numbers in images.numbers_by_label().items():
            by_class[class_form(images.class_names[label])] += numbers.tolist()
    for image in () if by_class else images:
        for name in dict.fromkeys(name for one in image.names() for name in _classes_of(one, column)):
            by_class[name].append(image.id)
    if not by_class:
        columns = sorted({name for image in images for name in image.attributes})
        raise UserError(f"The images have no {column!r} to forget by: choose from {', '.join(columns) or 'none'}.")
    selected: defaultdict[int, list[Request]] = defaultdict(list)
    for asked in dict.fromkeys(classes):
        wanted = class_form(asked)
        if wanted not in by_class:
            choices = near(wanted, sorted(by_class)) or sorted(by_class)
            raise UserError(
                f"No image has the {column} {asked!r}: choose from {', '.join(choices[:20])}{several_hint(asked)}."
            )
        for number in by_class[wanted]:
            selected[number].append(("class", asked))
    if not selected:
        raise UserError("Nothing to forget: name at least one class.")
    return selected


def class_form(name: str) -> str:
    """A class as it is compared: in one Unicode form, without spaces and slashes around it."""
    return unicodedata.normalize("NFC", name).strip().strip("/")


def _classes_of(image: CaptionedImage, column: str) -> Iterator[str]:
    value = image.attributes.get(column)
    if value is None:
        return
    yield class_form(value)
    if value.startswith("["):
        try:
            members = parse_json(value)
        except ValueError:
            return
        yield from (class_form(member) for member in members if isinstance(member, str))
    elif column == CLASS and image.path.parent.as_posix().endswith(value):
        names = value.split("/")
        yield from (class_form("/".join(names[:count])) for count in range(1, len(names)))


def select_phrases(images: Sequence[CaptionedImage], phrases: Iterable[str]) -> Selected:
    """Select the images with a caption that contains one of ``phrases`` as whole words: see ``contains_phrase``.

    Raises:
        UserError: for a phrase that no caption has.
    """
    forms = {phrase: normal_form(phrase) for phrase in phrases}
    for phrase, form in forms.items():
        if not form:
            raise UserError(f"The phrase {phrase!r} to forget is empty: choose words that the captions use.")
    selected: defaultdict[int, list[Request]] = defaultdict(list)
    found = set()
    described = images.captions_by_id() if isinstance(images, ImageTable) else ((i.id, i.captions()) for i in images)
    for number, captions in described:
        normal = [normal_form(caption) for caption in captions]
        for phrase, form in forms.items():
            if any(contains_phrase(caption, form) for caption in normal):
                selected[number].append(("phrase", phrase))
                found.add(phrase)
    for phrase, form in forms.items():
        if phrase not in found:
            raise UserError(
                f"No caption has {phrase!r} in it: choose words that the captions use{_used(images, form)}."
            )
    if not selected:
        raise UserError("Nothing to forget: name at least one phrase of the captions.")
    return selected


def _used(images: Sequence[CaptionedImage], phrase: str) -> str:
    """Words of the captions that resemble those of a phrase."""
    words = sorted(
        {word for image in images for caption in image.captions() for word in words_of(normal_form(caption))}
    )
    similar = [word for wanted in words_of(phrase) for word in near(wanted, words)]
    return f", such as {' or '.join(similar[:SHOWN])}" if similar else ""


def forget_retain_split(
    images: Images, forget_classes: Iterable[int], retain_classes: Iterable[int] | None = None
) -> tuple[Images, Images]:
    """Split labelled images by class.

    Args:
        images: the data set.
        forget_classes: numbers of the classes to forget.
        retain_classes: numbers of the classes to retain; None for all others.

    Returns:
        (forget, retain).

    Raises:
        UserError: for a class that no image has, a set that comes out empty, and sets that overlap.
    """
    present = sorted(set(images.class_labels.tolist()))
    forgotten = list(forget_classes)
    retained = [c for c in present if c not in forgotten] if retain_classes is None else list(retain_classes)
    _check_exist([*forgotten, *retained], present)
    if not forgotten:
        raise UserError(f"Nothing to forget: name at least one class of {_listed(present)}.")
    if not retained:
        raise UserError("Nothing is left to retain: forget fewer classes.")
    forget, retain = images.of_classes(forgotten), images.of_classes(retained)
    check_disjoint(forget.ids, retain.ids)
    return forget, retain


def check_disjoint(
    forget_ids: Tensor, retain_ids: Tensor, forget_names: Sequence[str] = (), retain_names: Sequence[str] = ()
) -> None:
    """Check that no image is in both sets, where it would be forgotten and relearned at once.

    A run compares the content of the images that it reads, so copies of others are not found: a retained image that no
    step sees does no harm, and of a forgotten one the run warns.

    Args:
        forget_ids: int64 [N].
        retain_ids: int64 [M].
        forget_names: N names of the images for the error message, or none.
        retain_names: M names, or none.

    Raises:
        UserError: if the sets share an id.
    """
    shared = set(forget_ids.tolist()) & set(retain_ids.tolist())
    if not shared:
        return
    forgotten, retained = _first_names(forget_ids, forget_names), _first_names(retain_ids, retain_names)
    pairs = [f"{name} is also {retained[number]}" for number, name in forgotten.items() if number in retained]
    named = f": {', '.join(pairs[:SHOWN])}{f' and {len(pairs) - SHOWN} more' if len(pairs) > SHOWN else ''}"
    raise UserError(
        f"The forget set and the retain set share {len(shared)} of {len(forget_ids)} forgotten images"
        f"{named if pairs else ''}; take them out of one of the two."
    )


def check_disjoint_paths(forget: Sequence[CaptionedImage], retain: Sequence[CaptionedImage]) -> None:
    """Check that no file is in both sets, without reading any. UserError as in ``check_disjoint``."""
    numbers: dict[str, int] = {}
    folders = cache(os.path.realpath)

    def numbered(images: Sequence[CaptionedImage]) -> Tensor:
        paths = [f"{folders(image.path.parent)}/{image.path.name}" for image in images]
        return torch.tensor([numbers.setdefault(path, len(numbers)) for path in paths], dtype=torch.int64)

    names = ([str(image.path) for image in images] for images in (forget, retain))
    check_disjoint(numbered(forget), numbered(retain), *names)


def _first_names(ids: Tensor, names: Sequence[str]) -> dict[int, str]:
    """The first name of each id; {} without names."""
    first: dict[int, str] = {}
    for number, name in zip(ids.tolist() if names else (), names, strict=True):
        first.setdefault(number, name)
    return first


def _check_exist(classes: list[int], present: list[int]) -> None:
    unknown = [c for c in classes if c not in present]
    if unknown:
        raise UserError(f"There is no class {_listed(unknown)} in the data: choose from {_listed(present)}.")


def _listed(classes: list[int]) -> str:
    return ", ".join(map(str, classes))
