"""Image files of all kinds, as upright RGB."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from erasediff.errors import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

EXIF_ORIENTATION = 0x0112
TURNED = frozenset({5, 6, 7, 8})  # orientations that exchange width and height


class BrokenImage(UserError):
    """A file that is no image, or only a part of one; the message names it."""


def open_picture(content: bytes, name: str) -> Image.Image:
    """The image in ``content`` as upright RGB, 8 bits a channel.

    The EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled, and of an animation the first
    frame is taken. BrokenImage, naming ``name``, for content that does not decode to its end.
    """
    with _decoding(name):
        opened = Image.open(_stream(content, name))
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def picture_size(content: bytes, name: str) -> tuple[int, int]:
    """(height, width) of the upright image, without decoding it where the format allows. BrokenImage as above."""
    with _decoding(name):
        image = Image.open(_stream(content, name))
        turned = image.getexif().get(EXIF_ORIENTATION) in TURNED
    return (image.width, image.height) if turned else (image.height, image.width)


def to_pixels(image: Image.Image) -> Tensor:
    """float32 [3, H, W] in [-1, 1] of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _stream(content: bytes, name: str) -> io.BytesIO:
    if not content:
        raise BrokenImage(f"The image {name} is empty: the file has no bytes.")
    return io.BytesIO(content)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"The image {name} is broken: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its content is of no known image format"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
