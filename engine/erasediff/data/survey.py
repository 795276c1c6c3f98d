"""A first look at images: what they hold as a hash, and how each will be cut."""

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

from erasediff.data.buckets import Buckets, Fit, Size, fitted
from erasediff.data.captions import CaptionedImage
from erasediff.data.pictures import BrokenImage, open_picture, picture_size
from erasediff.errors import UserError
from erasediff.runs.progress import progress_bar

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Surveyed:
    """An image, the SHA-256 of its file's content, its upright size, and its cut."""

    image: CaptionedImage
    digest: str
    original: Size
    fit: Fit

    def picture(self) -> Image.Image:
        """The image as it will be encoded, RGB. BrokenImage; UserError if the file has changed since the survey."""
        content = self.image.read()
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise UserError(f"The image {self.image.path} changed while it was being read: run the command again.")
        return fitted(open_picture(content, str(self.image.path)), self.fit)


class Digested(Protocol):
    """Anything that knows the SHA-256 of an image file's content."""

    @property
    def digest(self) -> str: ...


def content_ids(images: Iterable[Digested]) -> Tensor:
    """int64 [N], 63 bits of each image's SHA-256: equal for copies, as ``check_disjoint`` needs it."""
    return torch.tensor([int(image.digest[:16], 16) >> 1 for image in images], dtype=torch.int64)


class Broken:
    """What to do about broken images: refuse the first, or report each by name and go on without it."""

    def __init__(self, console: Console, *, skip: bool) -> None:
        self._console = console
        self._skip = skip

    def report(self, error: BrokenImage) -> None:
        """Raises ``error``, with the way to skip such images, unless they are skipped."""
        if not self._skip:
            raise UserError(f"{str(error).rstrip('.')}; repair or remove it, or give --skip-broken.") from error
        self._console.print(f"[yellow]Skipped:[/] {error}", highlight=False)


def survey(images: Sequence[CaptionedImage], buckets: Buckets, broken: Broken, console: Console) -> list[Surveyed]:
    """Read every image once. UserError as in ``Broken.report``, and for a file that cannot be read."""

    def look(image: CaptionedImage) -> Surveyed | BrokenImage:
        content = image.read()
        try:
            original = Size(*picture_size(content, str(image.path)))
        except BrokenImage as error:
            return error
        return Surveyed(image, hashlib.sha256(content).hexdigest(), original, buckets.fit(*original))

    surveyed = []
    with progress_bar(console, "Reading images", len(images)) as bar:
        for found in ahead(look, images):
            bar.advance()
            if isinstance(found, BrokenImage):
                broken.report(found)
            else:
                surveyed.append(found)
    return surveyed


def ahead(function: Callable[[A], B], items: Iterable[A], depth: int = 32) -> Iterator[B]:
    """``map``, in threads, at most ``depth`` results ahead of the caller."""
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
