"""Images of a data set against the lists of a run: every file that the run read, by its SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from erasediff.config import Config
from erasediff.data.image_folder import CaptionedImage
from erasediff.data.image_lists import FORGET, RETAIN
from erasediff.data.sources import ReadOptions, read_image_set
from erasediff.data.survey import ahead
from erasediff.errors import UserError
from erasediff.provenance.faults import Fault
from erasediff.provenance.figures import read_lines


def image_faults(run: Path, config: Config, data: Path) -> Iterator[Fault]:
    """Faults of the images that ``forget.jsonl`` and ``retain.jsonl`` name, each by its name within the data set.

    Args:
        run: Folder of the run.
        config: Its configuration.
        data: The data set, where it is now. Images that came from elsewhere, such as drawn ones, are not looked for.

    Raises:
        UserError: The run read no data set, or ``data`` cannot be read.
    """
    location = config.images.data
    if location is None:
        raise UserError("The run read no data set of images: omit --data.")
    options = ReadOptions(split=config.images.split, class_column=config.images.class_column)
    present = {_within(str(image.path), str(data)): image for image in read_image_set(str(data), options).images}
    listed = [
        (name, None if record.get("sha256") is None else str(record["sha256"]))
        for manifest in (FORGET, RETAIN)
        for record in _records(run / f"{manifest}.jsonl")
        if (name := _within(str(record.get("image")), location)) is not None
    ]

    def found(item: tuple[str, str | None]) -> str | None:
        name, expected = item
        image: CaptionedImage | None = present.get(name)
        if image is None:
            return "no such image"
        # An image that no step saw has no hash, and is there by its name alone.
        return None if expected is None else hashlib.sha256(image.read()).hexdigest()

    for (name, expected), digest in zip(listed, ahead(found, listed), strict=True):
        if digest != expected:
            yield Fault(f"image {name}", expected or "the image", str(digest))


def _records(manifest: Path) -> Iterator[dict[str, object]]:
    return read_lines(manifest) if manifest.is_file() else iter(())


def _within(name: str, location: str) -> str | None:
    """Name of an image within a data set; None for an image from elsewhere."""
    folder = str(Path(location))
    return name.removeprefix(folder).lstrip("/") if name.startswith(folder) else None
