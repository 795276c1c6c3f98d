"""Real images that a verdict compares with: those of a run by its lists, and unseen ones."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erasediff.config import Config
from erasediff.data import Buckets, CaptionedImage, load_digits
from erasediff.data.image_lists import FORGET, RETAIN
from erasediff.data.labelled_images import outlines
from erasediff.data.preprocessing import fitted, open_picture
from erasediff.models.base import LatentModel
from erasediff.verdict.examined import ExaminedModel
from erasediff.verdict.request import read_list
from erasediff.workflows.labelled_data import DIGITS
from erasediff.workflows.latent_data import read_data


@dataclass(frozen=True, slots=True)
class RealImages:
    """Images in the size of a model.

    Attributes:
        pixels: uint8 [N, 3, H, W] on the host.
        asks: What a model is asked for each with: a caption, or a class by name; "" for neither.
        labels: Class of each, or else its caption; "" for neither.
        names: Path or name of each, as lists have it.
    """

    pixels: Tensor
    asks: tuple[str, ...]
    labels: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.asks)

    def at(self, numbers: Sequence[int]) -> RealImages:
        """Those with some numbers."""
        columns = (self.asks, self.labels, self.names)
        return RealImages(self.pixels[list(numbers)], *(tuple(values[n] for n in numbers) for values in columns))


Record = Mapping[str, Any]


def run_images(config: Config, run: Path, size: tuple[int, int], *, forgotten: int, retained: int) -> list[RealImages]:
    """[images to forget, images to retain] that a run has seen, evenly spaced ones of each class.

    Those that are no longer there, or have another content by now, are left out.

    Args:
        config: Configuration of the run.
        run: Its folder, with its lists.
        size: (height, width) in pixels.
        forgotten: Number of images to forget, at most.
        retained: Likewise to retain.
    """
    wanted = [
        _spread([record for record in read_list(run, name) or () if record.get("sha256")], most)
        for name, most in ((FORGET, forgotten), (RETAIN, retained))
    ]
    if all(str(record["image"]).startswith(f"{DIGITS}/") for records in wanted for record in records):
        return [_digits(records) for records in wanted]
    found = _found(config, {str(record["image"]) for records in wanted for record in records})
    return [_read(records, found, size) for records in wanted]


def unseen_images(config: Config, examined: ExaminedModel, most: int) -> RealImages:
    """At most ``most`` evenly spaced images of ``verdict.unseen_data``, without those that a model cannot be asked for.

    Of a model with prompts, these have no caption; of one with classes, no class of its own. UserError where the images
    cannot be read.
    """
    location = config.verdict.unseen_data
    assert location is not None
    model = examined.model
    images = read_data(config.images, location, captions=False).images
    asks: list[tuple[int, Record]] = []
    for number, (path, caption, name) in enumerate(outlines(images)):
        record = {"image": path, "class": name} | ({"caption": caption} if isinstance(model, LatentModel) else {})
        if isinstance(model, LatentModel):
            is_asked = bool(caption)
        else:
            is_asked = model.condition == "none" or name in model.class_names
        if is_asked:
            asks.append((number, record))
    count = min(most, len(asks))
    chosen = [asks[number * len(asks) // count] for number in range(count)]
    found = {str(record["image"]): images[number] for number, record in chosen}
    return _read([record for _, record in chosen], found, size_of(examined))


def size_of(examined: ExaminedModel) -> tuple[int, int]:
    """(height, width) in pixels of the images that a model draws."""
    model: Any = examined.model
    return examined.size or (model.image_shape[1:] if hasattr(model, "image_shape") else model.default_size)


def _spread(records: Sequence[Record], most: int) -> list[Record]:
    """At most ``most`` of the records, evenly spaced ones and as many of each class."""
    classes: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        classes[str(record.get("class") or "")].append(record)
    each = max(most // max(len(classes), 1), 1)
    return [
        members[place * len(members) // min(each, len(members))]
        for members in classes.values()
        for place in range(min(each, len(members)))
    ]


def _digits(records: Iterable[Record]) -> RealImages:
    train = load_digits().train
    places = {int(number): place for place, number in enumerate(train.ids)}
    listed = list(records)
    chosen = [places[int(str(record["image"]).rpartition("/")[2])] for record in listed]
    pixels = ((train.sample[chosen] + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = tuple(str(record["class"]) for record in listed)
    return RealImages(pixels, labels, labels, tuple(str(record["image"]) for record in listed))


def _found(config: Config, names: set[str]) -> dict[str, CaptionedImage]:
    """Images by name, of the run's data sets or, such as those of prompts, in files of their own."""
    found = {}
    for location in filter(None, (config.images.data, config.images.forget_data)):
        images = read_data(config.images, location, captions=False).images
        for number, (path, _, _) in enumerate(outlines(images)):
            if path in names:
                found[path] = images[number]
    for name in names - set(found):
        if Path(name).is_file():
            found[name] = CaptionedImage(Path(name), "", 0)
    return found


def _read(records: Iterable[Record], found: Mapping[str, CaptionedImage], size: tuple[int, int]) -> RealImages:
    kept, pixels = [], [torch.empty(0, 3, *size, dtype=torch.uint8)]
    for record, picture in _decoded(records, found, size):
        kept.append(record)
        pixels.append(picture[None])
    classes = [str(record.get("class") or "") for record in kept]
    asks = [
        str(record["caption"]) if "caption" in record else named for record, named in zip(kept, classes, strict=True)
    ]
    labels = [named or asked for named, asked in zip(classes, asks, strict=True)]
    names = tuple(str(record["image"]) for record in kept)
    return RealImages(torch.cat(pixels), tuple(asks), tuple(labels), names)


def _decoded(
    records: Iterable[Record], found: Mapping[str, CaptionedImage], size: tuple[int, int]
) -> Iterator[tuple[Record, Tensor]]:
    for record in records:
        image = found.get(str(record["image"]))
        if image is None:
            continue
        content = image.read()
        if record.get("sha256") not in (None, hashlib.sha256(content).hexdigest()):
            continue
        picture = open_picture(content, str(image.path))
        crop = Buckets.only(*size).fit(picture.height, picture.width)
        yield record, torch.from_numpy(np.array(fitted(picture, crop))).permute(2, 0, 1)
