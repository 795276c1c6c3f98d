"""What is asked to be forgotten, among captioned images: by a list of files, by class, or by what captions say."""

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
    """The images to forget, never empty, and all the others, each in their order."""

    forget: list[CaptionedImage]
    retain: list[CaptionedImage]


def forget_files(images: Sequence[CaptionedImage], request: Path) -> Partition:
    """By a deletion request: a text file with one path per line; blank lines and those that begin with # do not count.

    A path may be absolute or the end of an image's path, its name alone if no other image has it.

    UserError for a request that cannot be read or is empty, and a path of no image or of several.
    """
    try:
        lines = [line.strip() for line in request.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"Cannot read the list of files to forget, {request}: give a UTF-8 text file.") from None
    wanted = [line for line in lines if line and not line.startswith("#")]
    if not wanted:
        raise UserError(f"The list of files to forget, {request}, is empty: write one path per line.")

    named: defaultdict[str, list[CaptionedImage]] = defaultdict(list)
    for image in images:
        named[image.path.name].append(image)
    chosen = set()
    for line in wanted:
        parts = PurePath(line).parts
        found = [image for image in named[parts[-1]] if image.path.parts[-len(parts) :] == parts]
        if len(found) != 1:
            problem = "is no image of the data" if not found else f"may be any of {len(found)} images: write more of it"
            raise UserError(f"{request}: {line} {problem}.")
        chosen.add(found[0].id)
    return _partition(images, lambda image: image.id in chosen, "")


def forget_classes(images: Sequence[CaptionedImage], classes: Iterable[str], column: str = CLASS) -> Partition:
    """By class: the images whose attribute ``column`` is one of ``classes``. UserError for a class of no image."""
    wanted = set(classes)
    present = {image.attributes[column] for image in images if column in image.attributes}
    if not present:
        columns = sorted({name for image in images for name in image.attributes})
        raise UserError(f"The images have no {column!r} to forget by: choose from {', '.join(columns) or 'none'}.")
    for unknown in sorted(wanted - present):
        near = difflib.get_close_matches(unknown, present) or sorted(present)
        raise UserError(f"No image has the {column} {unknown!r}: choose from {', '.join(near[:20])}.")
    return _partition(images, lambda image: image.attributes.get(column) in wanted, "name at least one class")


def forget_phrases(images: Sequence[CaptionedImage], phrases: Iterable[str]) -> Partition:
    """By prompt: the images whose caption has one of ``phrases`` in it, as whole words, in any case.

    UserError for a phrase that no caption has.
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
    """(forget, retain): the images of ``forget_classes``, and those of ``retain_classes`` or of all other classes.

    UserError for a class that no image has, a set that comes out empty, and sets that overlap.
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
    """UserError if an image is in both sets: it would be forgotten and relearned at once."""
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
