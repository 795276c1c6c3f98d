"""Forget and retain sets: split images by files, classes, or phrases of their captions."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from torch import Tensor

from erasediff.data.digits import Images
from erasediff.data.image_folder import CLASS, CaptionedImage
from erasediff.errors import UserError


class Partition(NamedTuple):
    """Images to forget and images to retain, each in the order of their data set."""

    forget: list[CaptionedImage]
    retain: list[CaptionedImage]


def forget_files(images: Sequence[CaptionedImage], request: Path) -> Partition:
    """Forget the images listed in a deletion request.

    Args:
        images: the data set.
        request: a text file with one path per line; blank lines and those that begin with # do not count. A path may
            be absolute or the end of an image's path, its name alone if no other image has it.

    Raises:
        UserError: for a request that cannot be read or is empty, and a path of no image or of several.
    """
    try:
        lines = [line.strip() for line in request.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"Cannot read the list of files to forget, {request}: give a UTF-8 text file.") from None
    requested = [line for line in lines if line and not line.startswith("#")]
    if not requested:
        raise UserError(f"The list of files to forget, {request}, is empty: write one path per line.")

    by_name: defaultdict[str, list[CaptionedImage]] = defaultdict(list)
    for image in images:
        by_name[image.path.name].append(image)
    forgotten = set()
    for line in requested:
        parts = PurePath(line).parts
        matches = [image for image in by_name[parts[-1]] if image.path.parts[-len(parts) :] == parts]
        if not matches:
            raise UserError(f"{request}: {line} is no image of the data; remove it or correct the path.")
        if len(matches) > 1:
            raise UserError(f"{request}: {line} may be any of {len(matches)} images; write more of its path.")
        forgotten.add(matches[0].id)
    return _partition(images, lambda image: image.id in forgotten, "")


def forget_classes(images: Sequence[CaptionedImage], classes: Iterable[str], column: str = CLASS) -> Partition:
    """Forget the images whose attribute ``column`` is one of ``classes``.

    Raises:
        UserError: for a class of no image.
    """
    names = set(classes)
    present = {image.attributes[column] for image in images if column in image.attributes}
    if not present:
        columns = sorted({name for image in images for name in image.attributes})
        raise UserError(f"The images have no {column!r} to forget by: choose from {', '.join(columns) or 'none'}.")
    for unknown in sorted(names - present):
        near = difflib.get_close_matches(unknown, present) or sorted(present)
        raise UserError(f"No image has the {column} {unknown!r}: choose from {', '.join(near[:20])}.")
    return _partition(images, lambda image: image.attributes.get(column) in names, "name at least one class")


def forget_phrases(images: Sequence[CaptionedImage], phrases: Iterable[str]) -> Partition:
    """Forget the images whose caption contains one of ``phrases``, as whole words, in any case.

    Raises:
        UserError: for a phrase that no caption has.
    """
    patterns = {phrase: re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE) for phrase in phrases}
    for phrase, pattern in patterns.items():
        if not any(pattern.search(image.caption) for image in images):
            raise UserError(f"No caption has {phrase!r} in it: choose words that the captions use.")
    return _partition(
        images,
        lambda image: any(pattern.search(image.caption) for pattern in patterns.values()),
        "name at least one phrase of the captions",
    )


def _partition(images: Sequence[CaptionedImage], forgotten: Callable[[CaptionedImage], bool], remedy: str) -> Partition:
    partition = Partition([i for i in images if forgotten(i)], [i for i in images if not forgotten(i)])
    if not partition.forget:
        raise UserError(f"Nothing to forget: {remedy}.")
    return partition


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


def check_disjoint(forget_ids: Tensor, retain_ids: Tensor) -> None:
    """Check that no image is in both sets, where it would be forgotten and relearned at once.

    Args:
        forget_ids: int64 [N].
        retain_ids: int64 [M].

    Raises:
        UserError: if the sets share an id.
    """
    shared = set(forget_ids.tolist()) & set(retain_ids.tolist())
    if shared:
        raise UserError(
            f"The forget set and the retain set share {len(shared)} of {len(forget_ids)} forgotten images: "
            "take them out of one of the two."
        )


def _check_exist(classes: list[int], present: list[int]) -> None:
    unknown = [c for c in classes if c not in present]
    if unknown:
        raise UserError(f"There is no class {_listed(unknown)} in the data: choose from {_listed(present)}.")


def _listed(classes: list[int]) -> str:
    return ", ".join(map(str, classes))
