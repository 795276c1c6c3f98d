"""Image preprocessing: decode to upright RGB, resize and crop to aspect-ratio buckets, convert to tensors."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from erasediff.data.image_formats import MAGIC_BYTES, SUFFIXES, conversion_advice, is_heif, readable_formats
from erasediff.errors import UserError

EXIF_ORIENTATION = 0x0112
TURNED = frozenset({5, 6, 7, 8})  # orientations that exchange width and height
MOST_PIXELS = 178_956_970
"""The most that Pillow decodes, 2/3 of a gigabyte in three channels: few bytes may stand for very many pixels."""
WHITE_16 = 65_535
DEFAULT_STEP = 64
MIN_AREA_RATIO = 0.9
MAX_ASPECT_RATIO = 4.0


class BrokenImage(UserError):
    """An image file that cannot be decoded; the message names it."""


def open_picture(content: bytes, name: str) -> Image.Image:
    """Decode an image file to upright RGB, 8 bits a channel.

    The EXIF rotation is applied where it can be read, colour profiles are not. Transparency is laid on white, 16-bit
    grey is scaled, and of an animation or several pages the first is taken. The format is told by the content, among
    those of ``image_formats``.

    Args:
        content: of the file.
        name: for the error message.

    Raises:
        BrokenImage: for content that does not decode to its end, is of another format, or holds floating-point values
            or more than ``MOST_PIXELS``.
    """
    with _decoding(name, content):
        opened = _opened(content)
        opened.load()
        image = ImageOps.exif_transpose(opened)
        if image.mode == "F":
            raise ValueError("it holds floating-point values, whose range is unknown")
        if image.mode.startswith("I"):
            image = _from_16_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def picture_size(content: bytes, name: str) -> tuple[int, int]:
    """(height, width) of the upright image, without decoding it where the format allows. BrokenImage as above."""
    with _decoding(name, content):
        image = _opened(content)
        turned = image.getexif().get(EXIF_ORIENTATION) in TURNED
    return (image.width, image.height) if turned else (image.height, image.width)


def _opened(content: bytes) -> Image.Image:
    """An image of which the header alone has been read."""
    image = Image.open(io.BytesIO(content), formats=readable_formats())
    if image.width * image.height > MOST_PIXELS:
        raise Image.DecompressionBombError
    return image


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey in 8 bits of grey in 16 bits, with the level that stands for transparency as white."""
    levels = np.asarray(image, np.int64)
    if levels.min() < 0 or levels.max() > WHITE_16:
        raise ValueError("it holds whole numbers of more than 16 bits, whose range is unknown")
    if (transparent := image.info.get("transparency")) is not None:
        levels = np.where(levels == transparent, WHITE_16, levels)
    return Image.fromarray((levels / 257).round().astype(np.uint8))


def to_pixels(image: Image.Image) -> Tensor:
    """float32 [3, H, W] in [-1, 1] of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


@contextmanager
def _decoding(name: str, content: bytes) -> Iterator[None]:
    if not content:
        raise BrokenImage(f"The image {name} is empty: the file has no bytes.")
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Decoders raise errors of any type for bytes that they were not written for.
        raise BrokenImage(f"The image {name} is broken: {_reason(error, content)}.") from error


def _reason(error: BaseException, content: bytes) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than the {MOST_PIXELS:,} pixels that are read: scale it down, or remove it"
    if isinstance(error, UnidentifiedImageError):
        if is_heif(content[:MAGIC_BYTES]):
            return f"it is in the format HEIF: {conversion_advice(SUFFIXES['HEIF'][0])}"
        return "its content is of no image format that is read"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


class Fit(NamedTuple):
    """Resize and crop of an image to its bucket: scaled to ``scaled``, then cropped to ``size`` at (top, left)."""

    size: Size
    scaled: Size
    top: int
    left: int


@dataclass(frozen=True, slots=True)
class Buckets:
    """Aspect-ratio buckets: the sizes that images are resized and cropped to."""

    sizes: tuple[Size, ...]

    @classmethod
    def only(cls, height: int, width: int) -> Buckets:
        """A single bucket, for all images."""
        return cls((Size(height, width),))

    @classmethod
    def around(cls, height: int, width: int, step: int = DEFAULT_STEP) -> Buckets:
        """All sizes in multiples of ``step`` of nine tenths to the whole of the area, no longer than 4 to 1.

        For 1024 x 1024 these are SDXL's 40 (Podell et al. 2023, appendix I) and 1344 x 704, whose mirror image is among
        them. ``height`` x ``width`` itself is always among them.

        Raises:
            UserError: if a side is smaller than ``step``.
        """
        if min(height, width) < step:
            raise UserError(f"Images of {width} x {height} are smaller than the bucket step {step}: lower the step.")
        area = height * width
        longest = math.isqrt(int(area * MAX_ASPECT_RATIO))
        sides = range(step, longest + 1, step)
        sizes = {
            Size(h, w)
            for h in sides
            for w in sides
            if MIN_AREA_RATIO * area <= h * w <= area and 1 / MAX_ASPECT_RATIO <= h / w <= MAX_ASPECT_RATIO
        }
        return cls(tuple(sorted(sizes | {Size(height, width)})))

    def fit(self, height: int, width: int) -> Fit:
        """The bucket nearest in the logarithm of the aspect ratio, and the centre crop."""
        size = min(
            self.sizes, key=lambda s: (abs(math.log((s.height * width) / (s.width * height))), -s.height * s.width)
        )
        scale = max(size.height / height, size.width / width)
        scaled = Size(max(size.height, round(height * scale)), max(size.width, round(width * scale)))
        return Fit(size, scaled, (scaled.height - size.height) // 2, (scaled.width - size.width) // 2)


def fitted(image: Image.Image, fit: Fit) -> Image.Image:
    """``image`` resized (Lanczos, with antialiasing) and cropped as ``fit`` says."""
    scaled = image.resize((fit.scaled.width, fit.scaled.height), Image.Resampling.LANCZOS)
    return scaled.crop((fit.left, fit.top, fit.left + fit.size.width, fit.top + fit.size.height))
