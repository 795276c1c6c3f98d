"""Lists of the images that a run forgets and retains, with the SHA-256 of each, as files of its folder."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat, zip_longest
from json.encoder import encode_basestring_ascii as _quoted
from pathlib import Path
from typing import Any, Literal

from erasediff.data.cached_images import CachedImages
from erasediff.data.digits import Images
from erasediff.data.image_folder import CaptionedImage
from erasediff.data.labelled_images import NumberedImages, outlines
from erasediff.errors import UserError
from erasediff.io.atomic import atomic_write
from erasediff.io.json_file import parse_object
from erasediff.io.user_file import read_text
from erasediff.utils.collector import paused_collector

FORGET, RETAIN = "forget", "retain"


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image as it is listed.

    Attributes:
        name: path of its file, or its name in a data set.
        sha256: of its file's content, or of its pixels; None for an image that the run does not read.
        condition: ``caption`` or ``class``, and its value.
        class_name: class of an image with a caption, if it has one.
        selected_by: what asks to forget it: pairs such as ("phrase", "sneaker").
    """

    name: str
    sha256: str | None
    condition: tuple[str, str]
    selected_by: tuple[tuple[str, str], ...] = ()
    class_name: str | None = None

    def record(self) -> dict[str, Any]:
        """The image as a mapping."""
        record: dict[str, Any] = {"image": self.name, "sha256": self.sha256, self.condition[0]: self.condition[1]}
        if self.class_name is not None:
            record["class"] = self.class_name
        return record | ({"selected_by": [": ".join(pair) for pair in self.selected_by]} if self.selected_by else {})

    def line(self) -> str:
        """The image as a line of JSON."""
        if self.selected_by or self.sha256 is not None:
            return json.dumps(self.record())
        # ``json.dumps`` sets up an encoder each time, which takes most of the time for a million short records.
        kind, value = self.condition
        of_class = "" if self.class_name is None else f', "class": {_quoted(self.class_name)}'
        return f'{{"image": {_quoted(self.name)}, "sha256": null, "{kind}": {_quoted(value)}{of_class}}}'


@dataclass(frozen=True, slots=True)
class ImageLists:
    """Images that a run forgets and retains, each in the order of its data set.

    Attributes:
        forget: all images to forget.
        retain: all images to retain.
        warning: a sentence about images to forget that the run never sees, if there are any.
    """

    forget: tuple[ListedImage, ...]
    retain: tuple[ListedImage, ...]
    warning: str | None = None

    def summary(self) -> str:
        """A line such as "forgetting 3 of 6 images (by phrase: 3), retaining 3".

        An image that is asked for in several ways counts in each of them. Of retained images that the run does not all
        read, it says how many it does.
        """
        ways = Counter(way for image in self.forget for way in {way for way, _ in image.selected_by})
        counted = ", ".join(f"by {way}: {count:,}" for way, count in sorted(ways.items()))
        read = sum(image.sha256 is not None for image in self.retain)
        seen = "" if read == len(self.retain) else f", of which the run sees {read:,}"
        every = len(self.forget) + len(self.retain)
        return (
            f"Request: forgetting {len(self.forget):,} of {every:,} images{f' ({counted})' if counted else ''}, "
            f"retaining {len(self.retain):,}{seen}."
        )

    def record(self, run: Path) -> None:
        """Write ``forget.jsonl`` and ``retain.jsonl`` to a run's folder, where they are not yet.

        Raises:
            UserError: for a run that was started with other images.
        """
        lists = [(run / f"{name}.jsonl", images) for name, images in ((FORGET, self.forget), (RETAIN, self.retain))]
        for path, images in lists:
            if path.is_file():
                _check_same(path, images)
        for path, images in lists:
            if not path.is_file():
                atomic_write(path, "".join(f"{image.line()}\n" for image in images))


@paused_collector()
def listed_images(
    images: Sequence[CaptionedImage], cached: CachedImages, condition: Literal["caption", "class"]
) -> tuple[ListedImage, ...]:
    """List the images of a data set, without those that proved broken.

    Args:
        images: the data set.
        cached: those of them that the run reads.
        condition: what the model is conditioned on.
    """
    digests = {entry.number: entry.digest for entry in cached.entries}
    read = range(len(images)) if cached.chosen is None else set(cached.chosen.tolist())
    # Retained images of a lazy data set are not made for this.
    requests = repeat(()) if isinstance(images, NumberedImages) else (image.selected_by for image in images)
    return tuple(
        ListedImage(
            path,
            digests.get(number),
            (condition, caption if condition == "caption" else name),
            request,
            # Of an image folder without classes, it is the empty one.
            (name or None) if condition == "caption" else None,
        )
        for number, ((path, caption, name), request) in enumerate(zip(outlines(images), requests, strict=False))
        if number in digests or number not in read
    )


def lists_of_tensors(forget: Images, retain: Images, source: str) -> ImageLists:
    """Lists of images in memory, named by their numbers in the data set ``source`` and forgotten by class."""

    def listed(images: Images, *, forgotten: bool) -> tuple[ListedImage, ...]:
        return tuple(
            ListedImage(
                f"{source}/{number}",
                hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
                ("class", str(label)),
                (("class", str(label)),) if forgotten else (),
            )
            for pixels, label, number in zip(
                images.sample.cpu(), images.class_labels.tolist(), images.ids.tolist(), strict=True
            )
        )

    return ImageLists(listed(forget, forgotten=True), listed(retain, forgotten=False))


def _check_same(path: Path, images: Sequence[ListedImage]) -> None:
    """UserError that names the first image which is another one than in the file."""
    try:
        stored = [parse_object(line) for line in read_text(path).split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"The list of images {path} cannot be read ({error}): begin a new run.") from error
    for old, new in zip_longest(stored, (image.record() for image in images)):
        if _content(old) != _content(new):
            raise UserError(
                f"The run was started with other images to {path.stem} than there are now: {_difference(old, new)} "
                f"({path}); restore them, or begin a new run."
            )


def _content(record: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    """What batches depend on. A path may change: images of prompts are in the cache."""
    if record is None:
        return None
    # Earlier runs did not list the classes of images with captions.
    return record.get("sha256"), record.get("caption"), None if "caption" in record else record.get("class")


def _difference(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str:
    if new is None:
        assert old is not None
        return f"{old.get('image')} is missing"
    if old is None:
        return f"{new['image']} is new"
    if old.get("image") != new["image"]:
        return f"{new['image']} is in the place of {old.get('image')}"
    if old.get("sha256") != new["sha256"]:
        return f"{new['image']} has changed"
    return f"{new['image']} has another caption"
