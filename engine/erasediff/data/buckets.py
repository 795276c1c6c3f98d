"""Aspect-ratio buckets: images of many shapes, each brought to the nearest of a few sizes of about one area."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from erasediff.errors import UserError

USUAL_STEP = 64
SMALLEST_AREA = 0.9
WIDEST = 4.0


class Size(NamedTuple):
    """In pixels."""

    height: int
    width: int


class Fit(NamedTuple):
    """How an image comes to a bucket: scaled to ``scaled``, then cut to ``size`` from ``top``, ``left`` on."""

    size: Size
    scaled: Size
    top: int
    left: int


@dataclass(frozen=True, slots=True)
class Buckets:
    """The sizes that images are brought to."""

    sizes: tuple[Size, ...]

    @classmethod
    def only(cls, height: int, width: int) -> Buckets:
        """A single size: every image is cut to it."""
        return cls((Size(height, width),))

    @classmethod
    def around(cls, height: int, width: int, step: int = USUAL_STEP) -> Buckets:
        """All sizes in multiples of ``step`` of nine tenths to the whole of the area, no longer than 4 to 1.

        For 1024 x 1024 these are SDXL's 40 (Podell et al. 2023, appendix I) and 1344 x 704, whose mirror image is among
        them. ``height`` x ``width`` itself is always among them. UserError if it is smaller than one ``step``.
        """
        if min(height, width) < step:
            raise UserError(f"Images of {width} x {height} are smaller than the bucket step {step}: lower the step.")
        area = height * width
        longest = math.isqrt(int(area * WIDEST))
        sides = range(step, longest + 1, step)
        found = {
            Size(h, w)
            for h in sides
            for w in sides
            if SMALLEST_AREA * area <= h * w <= area and 1 / WIDEST <= h / w <= WIDEST
        }
        return cls(tuple(sorted(found | {Size(height, width)})))

    def fit(self, height: int, width: int) -> Fit:
        """The bucket nearest in the logarithm of the aspect ratio, and the cut about the image's centre."""
        size = min(
            self.sizes, key=lambda s: (abs(math.log((s.height * width) / (s.width * height))), -s.height * s.width)
        )
        scale = max(size.height / height, size.width / width)
        scaled = Size(max(size.height, round(height * scale)), max(size.width, round(width * scale)))
        return Fit(size, scaled, (scaled.height - size.height) // 2, (scaled.width - size.width) // 2)


def fitted(image: Image.Image, fit: Fit) -> Image.Image:
    """``image`` scaled (Lanczos, with antialiasing) and cut as ``fit`` says."""
    scaled = image.resize((fit.scaled.width, fit.scaled.height), Image.Resampling.LANCZOS)
    return scaled.crop((fit.left, fit.top, fit.left + fit.size.width, fit.top + fit.size.height))
