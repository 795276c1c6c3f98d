"""Images of a data set against the lists of a run: every file that the run read, by its SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from erasediff.config import Config
from erasediff.data.image_folder import CaptionedImage
from erasediff.data.image_lists import FORGET, RETAIN
from erasediff.data.sources import ReadOptions, read_image_set
from erasediff.data.survey import ahead
from erasediff.provenance.faults import Fault
from erasediff.provenance.json_lines import read_lines

ListedDigest = tuple[str, str | None]
"""Name of an image within its data set, and its SHA-256; None for one that no step of the run saw."""


def image_faults(config: Config, listed: Sequence[ListedDigest], data: Path) -> Iterator[Fault]:
    """Faults of the images of a run, each by its name within the data set.

    Args:
        config: The run's configuration.
        listed: Its images, see ``listed_digests``.
        data: The data set, where it is now.

    Raises:
        UserError: ``data`` cannot be read.
    """
    options = ReadOptions(split=config.images.split, class_column=config.images.class_column)
    present = {_within(str(image.path), str(data)): image for image in read_image_set(str(data), options).images}

    def found(item: ListedDigest) -> str | None:
        name, expected = item
        image: CaptionedImage | None = present.get(name)
        if image is None:
            return "no such image"
        # An image that no step saw has no hash, and is there by its name alone.
        return None if expected is None else hashlib.sha256(image.read()).hexdigest()

    for (name, expected), digest in zip(listed, ahead(found, listed), strict=True):
        if digest != expected:
            yield Fault(f"image {name}", expected or "the image", str(digest))


def listed_digests(run: Path, location: str) -> list[ListedDigest]:
    """Images of a run's lists that came from the data set ``location``, and not from elsewhere, such as drawn ones.

    UserError for a list that is damaged.
    """
    return [
        (name, None if record.get("sha256") is None else str(record["sha256"]))
        for manifest in (FORGET, RETAIN)
        for record in _records(run / f"{manifest}.jsonl")
        if (name := _within(str(record.get("image")), location)) is not None
    ]


def _records(manifest: Path) -> Iterator[dict[str, object]]:
    return read_lines(manifest) if manifest.is_file() else iter(())


def _within(name: str, location: str) -> str | None:
    """Name of an image within a data set; None for an image from elsewhere."""
    folder = str(Path(location))
    return name.removeprefix(folder).lstrip("/") if name.startswith(folder) else None
