"""Images that are arrays of pixels: as image files in memory, which the rest of the pipeline reads as any others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erasediff.data.labelled_images import UNLABELLED, LabelledImages
from erasediff.data.sources.base import MOST_NUMBERED, ImageSet
from erasediff.errors import UserError

Pixels = NDArray[np.uint8]
Arrays = Sequence[Any] | NDArray[Any]


def netpbm(pixels: Pixels) -> bytes:
    """A binary PGM or PPM file of uint8 ``pixels`` [H, W] or [H, W, 1 or 3]: a header and the bytes themselves."""
    height, width, *channels = pixels.shape
    kind = "P6" if channels == [3] else "P5"
    return f"{kind}\n{width} {height}\n255\n".encode() + np.ascontiguousarray(pixels).tobytes()


def array_images(location: str, arrays: Arrays, labels: Sequence[int] | None, class_names: Sequence[str]) -> ImageSet:
    """Image set of arrays.

    Args:
        location: Where the arrays are from; image i is called ``location``/i.
        arrays: uint8 [H, W] or [H, W, 1 or 3] for each image, read when it is needed.
        labels: Number of each image's class; None for a set without classes.
        class_names: Names of the classes by number; () for their numbers.

    Raises:
        UserError: A label is none of the classes', or there are more or fewer than images.
    """
    read = partial(_read, arrays)
    if labels is None:
        return ImageSet(LabelledImages.all_of(location, read, np.full(len(arrays), UNLABELLED)))
    if len(labels) != len(arrays):
        raise UserError(f"{location} has {len(arrays)} images but {len(labels)} labels: it is damaged.")
    count = max(labels, default=-1) + 1
    if count > MOST_NUMBERED:
        raise UserError(f"{location} has a label of {count - 1:,}: it is damaged, or these are no numbers of classes.")
    names = tuple(class_names) or tuple(map(str, range(count)))
    if min(labels, default=0) < 0 or count > len(names):
        raise UserError(f"{location} has labels outside of 0 to {len(names) - 1}: it is damaged, or has other classes.")
    return ImageSet(LabelledImages.all_of(location, read, np.array(labels, np.int64), class_names=names), names)


def _read(arrays: Arrays, number: int) -> bytes:
    return netpbm(np.asarray(arrays[number]))
