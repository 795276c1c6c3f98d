"""Image sets of ``torch.utils.data.Dataset``s, for use from Python."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from erasediff.data.labelled_images import UNLABELLED, LabelledImages
from erasediff.data.sources.base import ImageSet
from erasediff.data.sources.pixel_arrays import netpbm

LABEL_NAMES, IMAGE_NAMES, CAPTION_NAMES = ("label", "class", "labels"), ("image", "img"), ("text", "caption", "prompt")


def from_torch_dataset(dataset: Any, *, class_names: Sequence[str] | None = None, name: str = "dataset") -> ImageSet:
    """Image set of a map-style ``torch.utils.data.Dataset``.

    Labels are its ``targets``, as torchvision's data sets have them; without, each item is asked once. Images are
    decoded only when they are encoded.

    Args:
        dataset: Its items are images, (image, label) pairs, or dicts with "image" and, if any, "label" and "text". An
            image is a PIL image, or uint8 or floating point in [0, 1]: a tensor [C, H, W] or an array [H, W, C].
        class_names: Names of the classes by number; None for the data set's own ``classes``, or numbers.
        name: What the images are called after.

    Raises:
        ValueError: The data set has no length, or an item is none of these.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError("the data set has no length: give a map-style torch.utils.data.Dataset")
    targets = getattr(dataset, "targets", None)
    items = [_described(dataset[number]) for number in range(len(dataset))] if targets is None else []
    if targets is None:
        labels = np.array([UNLABELLED if label is None else label for _, label in items], np.int64)
    elif isinstance(targets, Tensor | np.ndarray):
        labels = np.asarray(targets, np.int64)
    else:
        labels = np.fromiter(map(int, targets), np.int64)
    count = int(labels.max(initial=UNLABELLED)) + 1
    names = tuple(class_names or getattr(dataset, "classes", ()) or map(str, range(count)))
    if count > len(names):
        raise ValueError(f"the data set has labels up to {count - 1}, but only {len(names)} class names")
    captions = [caption for caption, _ in items] if any(caption for caption, _ in items) else []
    names = tuple(map(str, names))
    images = LabelledImages.all_of(name, partial(_stored, dataset), labels, class_names=names, captions=captions)
    return ImageSet(images, names if count else ())


def _described(item: Any) -> tuple[str, int | None]:
    """(caption, label) of an item."""
    if isinstance(item, Mapping):
        label, caption = _first(item, LABEL_NAMES), _first(item, CAPTION_NAMES)
        return str(caption or ""), None if label is None else int(label)
    if isinstance(item, tuple | list) and len(item) == 2:
        return "", int(item[1])
    return "", None


def _first(item: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((item[name] for name in names if name in item), None)


def _stored(dataset: Any, number: int) -> bytes:
    """The image of an item as the content of a file without loss."""
    item = dataset[number]
    image = _first(item, IMAGE_NAMES) if isinstance(item, Mapping) else item
    if isinstance(image, tuple | list):
        image = image[0]
    if isinstance(image, Image.Image):
        content = io.BytesIO()
        image.save(content, format="PNG")
        return content.getvalue()
    if isinstance(image, Tensor):
        image = image.detach().cpu().float() if image.is_floating_point() else image.detach().cpu()
        image = image.movedim(0, -1).numpy() if image.ndim == 3 else image.numpy()
    pixels = np.asarray(image)
    if pixels.dtype.kind == "f" and pixels.size and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise ValueError(
            f"item {number} of the data set is no image: {pixels.dtype} {list(pixels.shape)}; give uint8, or floating "
            "point in [0, 1], of 1 or 3 channels"
        )
    return netpbm(pixels)
