"""Survey of image files: the digest, size and bucket of each, before any is encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from erasediff.data.image_folder import CaptionedImage
from erasediff.data.preprocessing import BrokenImage, Buckets, Fit, Size, fitted, open_picture, picture_size
from erasediff.errors import UserError
from erasediff.utils.progress import progress_bar

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """A surveyed image.

    Attributes:
        image: not decoded.
        digest: SHA-256 of its file's content.
        original: its upright size.
        fit: its resize and crop.
        number: its place in its data set.
    """

    image: CaptionedImage
    digest: str
    original: Size
    fit: Fit
    number: int

    def picture(self) -> Image.Image:
        """Decode, resize and crop the image, RGB.

        Raises:
            BrokenImage: if it does not decode to its end.
            UserError: if the file has changed since the survey.
        """
        content = self.image.read()
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise UserError(f"The image {self.image.path} changed while it was being read: run the command again.")
        return fitted(open_picture(content, str(self.image.path)), self.fit)


class Digested(Protocol):
    """Anything with the SHA-256 of an image file's content."""

    @property
    def digest(self) -> str: ...


def content_ids(images: Iterable[Digested]) -> Tensor:
    """int64 [N], 63 bits of each image's SHA-256: equal for copies, as ``check_disjoint`` needs it."""
    return torch.tensor([int(image.digest[:16], 16) >> 1 for image in images], dtype=torch.int64)


class BrokenImagePolicy:
    """Refuses the first broken image, or reports each by name and skips it."""

    def __init__(self, console: Console, *, skip: bool) -> None:
        self._console = console
        self._skip = skip

    def report(self, error: BrokenImage) -> None:
        """Print ``error`` if broken images are skipped; raise ``UserError`` that says how to skip them if not."""
        if not self._skip:
            raise UserError(f"{str(error).rstrip('.')}; repair or remove it, or give --skip-broken.") from error
        self._console.print(f"[yellow]Skipped:[/] {error}", highlight=False)


def survey(
    images: Sequence[CaptionedImage],
    buckets: Buckets,
    broken: BrokenImagePolicy,
    console: Console,
    numbers: Tensor | None = None,
) -> list[ImageRecord]:
    """Read image files once, for the digest, size and bucket of each.

    Args:
        images: the data set.
        buckets: sizes that images are resized and cropped to.
        broken: what becomes of a broken image.
        console: for a progress bar.
        numbers: int64 [n], ascending: the places of the images to read, such as ``first_shown``; None for all.

    Raises:
        UserError: as ``BrokenImagePolicy.report``, and for a file that cannot be read.
    """

    def read(place: int) -> ImageRecord | BrokenImage:
        image = images[place]
        content = image.read()
        try:
            original = Size(*picture_size(content, str(image.path)))
        except BrokenImage as error:
            return error
        digest = hashlib.sha256(content).hexdigest()
        return ImageRecord(image, digest, original, buckets.fit(*original), place)

    places: Sequence[int] = range(len(images)) if numbers is None else numbers.tolist()
    surveyed = []
    with progress_bar(console, "Reading images", len(places)) as bar:
        for result in ahead(read, places):
            bar.advance()
            if isinstance(result, BrokenImage):
                broken.report(result)
            else:
                surveyed.append(result)
    return surveyed


def ahead(function: Callable[[A], B], items: Iterable[A], depth: int = 32) -> Iterator[B]:
    """``map`` in threads, in order, at most ``depth`` results ahead of the caller."""
    with ThreadPoolExecutor() as pool:
        remaining = iter(items)
        running: list[Future[B]] = [pool.submit(function, item) for item in islice(remaining, depth)]
        try:
            while running:
                result = running.pop(0).result()
                running.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in running:
                future.cancel()
