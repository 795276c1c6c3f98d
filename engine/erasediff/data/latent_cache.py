"""Content-addressed cache of VAE latents and text embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from erasediff.data.encoder_outputs import check_embeddings, check_latents, encode_prompts
from erasediff.data.encoders import Encoders, ImageEncoder
from erasediff.data.image_folder import CaptionedImage
from erasediff.data.preprocessing import BrokenImage, Buckets, Fit, Size, fitted, open_picture, picture_size, to_pixels
from erasediff.data.tensor_store import ShardStore
from erasediff.errors import UserError
from erasediff.utils.progress import progress_bar

FORMAT = 1
LATENT, MIRRORED = "latent", "mirrored"
NULL_CAPTION = ""

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """A surveyed image.

    Attributes:
        image: not decoded.
        digest: SHA-256 of its file's content.
        original: its upright size.
        fit: its resize and crop.
    """

    image: CaptionedImage
    digest: str
    original: Size
    fit: Fit

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
    images: Sequence[CaptionedImage], buckets: Buckets, broken: BrokenImagePolicy, console: Console
) -> list[ImageRecord]:
    """Read every image file once, for its digest, size and bucket.

    Raises:
        UserError: as ``BrokenImagePolicy.report``, and for a file that cannot be read.
    """

    def read(image: CaptionedImage) -> ImageRecord | BrokenImage:
        content = image.read()
        try:
            original = Size(*picture_size(content, str(image.path)))
        except BrokenImage as error:
            return error
        return ImageRecord(image, hashlib.sha256(content).hexdigest(), original, buckets.fit(*original))

    surveyed = []
    with progress_bar(console, "Reading images", len(images)) as bar:
        for result in ahead(read, images):
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


@dataclass(frozen=True, slots=True)
class Entry:
    """An image in the cache.

    Attributes:
        digest: SHA-256 of its file's content.
        size: of its bucket.
        text: its caption.
        latent: key of its latents.
        caption: key of its caption's embeddings; "" in a set without captions.
        path: of its file, to name it.
        label: the number of its class, if it has one.
    """

    digest: str
    size: Size
    text: str
    latent: str
    caption: str
    path: str = field(compare=False)
    label: int | None = None


@dataclass(frozen=True, slots=True)
class CachedImages:
    """Images with latents and embeddings in the cache, in the order of their data set, without broken ones.

    Attributes:
        entries: one for each image.
        null_caption: key of the embeddings of the empty prompt; "" in a set without captions.
        mirrored: whether the latents of mirror images are there too.
        latents: store of latents and size conditions.
        captions: store of embeddings.
        labelled: whether rows have the class of their image.
        null_label: the label of no class, for rows whose label is dropped.
    """

    entries: tuple[Entry, ...]
    null_caption: str
    mirrored: bool
    latents: ShardStore
    captions: ShardStore
    labelled: bool = False
    null_label: int | None = None

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def ids(self) -> Tensor:
        """As ``content_ids``."""
        return content_ids(self.entries)

    def row(self, entry: Entry, *, flipped: bool = False, dropped: bool = False) -> dict[str, Tensor]:
        """One sample as batches stack it.

        Args:
            entry: of the image.
            flipped: take the mirror image.
            dropped: take the empty caption, or the null label.

        Returns:
            ``"sample"`` [C, h, w], the latent, and the condition tensors.

        Raises:
            UserError: for a latent or an embedding that is not finite, which earlier versions kept in the cache.
        """
        latents = self.latents.row(entry.latent)
        condition = {name: tensor for name, tensor in latents.items() if name not in (LATENT, MIRRORED)}
        prompted = self.captions.row(self.null_caption if dropped else entry.caption) if self.null_caption else {}
        sample = latents[MIRRORED if flipped else LATENT]
        check_latents({"sample": sample[None]}, [entry.path])
        check_embeddings({name: tensor[None] for name, tensor in prompted.items()}, ["" if dropped else entry.text])
        if self.labelled:
            prompted["class_labels"] = torch.tensor(self.null_label if dropped else entry.label)
        return {"sample": sample, **prompted, **condition}

    @property
    def buckets(self) -> Tensor:
        """int64 [N]: each image's bucket, numbered from 0 among those that occur."""
        numbers = {size: number for number, size in enumerate(sorted({entry.size for entry in self.entries}))}
        return torch.tensor([numbers[entry.size] for entry in self.entries], dtype=torch.int64)


class LatentCache:
    """Latents and text embeddings in ``folder``, for any number of data sets and models.

    The key of a latent is a hash of the file's content, its crop and the encoders' weights; that of an embedding, of
    the caption and the encoders' weights. So only what belongs to a changed file or caption is computed again, and a
    renamed file is not. An interrupted run resumes with what it had half a minute before.
    """

    def __init__(self, folder: Path) -> None:
        self.latents = ShardStore(folder / "latents")
        self.captions = ShardStore(folder / "captions")

    def fill(
        self,
        images: Sequence[CaptionedImage],
        model: Encoders,
        buckets: Buckets,
        console: Console,
        *,
        mirror: bool = False,
        skip_broken: bool = False,
        batch_size: int = 8,
    ) -> CachedImages:
        """Encode the images and captions that are not in the cache, under progress bars.

        Every file is read, to see whether it changed. Where nothing is missing, the encoders are not called: they may
        have left memory.

        Args:
            images: the data set.
            model: its encoders.
            buckets: sizes that images are resized and cropped to.
            console: for progress bars.
            mirror: keep the latents of each image's mirror image too, for horizontal flips.
            skip_broken: name broken images on ``console`` and go on without them.
            batch_size: images, or captions, encoded at once.

        Raises:
            UserError: for no images, a broken one unless skipped, one that cannot be read, latents or embeddings that
                are not finite, and a full disk.
        """
        broken = BrokenImagePolicy(console, skip=skip_broken)
        records = survey(images, buckets, broken, console)
        return self.encode(records, model, broken, console, mirror=mirror, batch_size=batch_size)

    def encode_unprompted(
        self,
        records: Sequence[ImageRecord],
        model: ImageEncoder,
        broken: BrokenImagePolicy,
        console: Console,
        *,
        labelled: bool,
        null_label: int | None,
        mirror: bool = False,
        batch_size: int = 8,
    ) -> CachedImages:
        """``encode`` for a model without prompts: captions are left out, and rows have class labels if ``labelled``."""
        keyed = [(_key(model, item.digest, item.fit, mirror), item) for item in records]
        with torch.no_grad():
            self._fill_latents(dict(keyed), model, mirror, batch_size, broken, console)
        entries = tuple(
            Entry(item.digest, item.fit.size, "", key, "", str(item.image.path), item.image.label)
            for key, item in keyed
            if key in self.latents
        )
        if not entries:
            raise UserError("No image is left to learn from: none was given, or all are broken.")
        return CachedImages(entries, "", mirror, self.latents, self.captions, labelled, null_label)

    def encode(
        self,
        records: Sequence[ImageRecord],
        model: Encoders,
        broken: BrokenImagePolicy,
        console: Console,
        *,
        mirror: bool = False,
        batch_size: int = 8,
    ) -> CachedImages:
        """``fill`` for images that were surveyed already."""
        keyed = [(_key(model, item.digest, item.fit, mirror), item) for item in records]
        captions = {caption: _key(model, caption) for caption in (NULL_CAPTION, *(i.image.caption for i in records))}

        with torch.no_grad():
            self._fill_captions(captions, model, batch_size, console)
            self._fill_latents(dict(keyed), model, mirror, batch_size, broken, console)
        entries = tuple(
            Entry(
                item.digest,
                item.fit.size,
                item.image.caption,
                key,
                captions[item.image.caption],
                str(item.image.path),
            )
            for key, item in keyed
            if key in self.latents
        )
        if not entries:
            raise UserError("No image is left to learn from: none was given, or all are broken.")
        return CachedImages(entries, captions[NULL_CAPTION], mirror, self.latents, self.captions)

    def _fill_captions(self, keys: dict[str, str], model: Encoders, batch_size: int, console: Console) -> None:
        missing = [caption for caption, key in keys.items() if key not in self.captions]
        if not missing:
            return
        with (
            progress_bar(console, "Encoding captions", len(missing)) as bar,
            self.captions.writing(len(missing)) as writer,
        ):
            for part in _parts(missing, batch_size):
                rows = encode_prompts(model, part)
                for number, caption in enumerate(part):
                    writer.add(keys[caption], {name: tensor[number] for name, tensor in rows.items()})
                bar.advance(len(part))

    def _fill_latents(
        self,
        items: dict[str, ImageRecord],
        model: ImageEncoder,
        mirror: bool,
        batch_size: int,
        broken: BrokenImagePolicy,
        console: Console,
    ) -> None:
        missing = [(key, item) for key, item in items.items() if key not in self.latents]
        if not missing:
            return
        missing.sort(key=lambda keyed: keyed[1].fit.size)
        size_condition: Callable[..., Mapping[str, Tensor]] = getattr(model, "size_condition", lambda *_: {})
        with (
            progress_bar(console, "Encoding images", len(missing)) as bar,
            self.latents.writing(len(missing)) as writer,
        ):
            for part, pixels in _stacked(missing, batch_size, broken):
                tensors = {LATENT: model.encode_images(pixels)}
                if mirror:
                    tensors[MIRRORED] = model.encode_images(pixels.flip(-1))
                check_latents(tensors, [item.image.path for _, item in part])
                for number, (key, item) in enumerate(part):
                    cut = item.fit
                    row = {name: tensor[number] for name, tensor in tensors.items()}
                    condition = size_condition(item.original, (cut.top, cut.left), cut.size, 1)
                    writer.add(key, row | {name: tensor[0] for name, tensor in condition.items()})
                bar.advance(len(part))


def _stacked(
    keyed: list[tuple[str, ImageRecord]], batch_size: int, broken: BrokenImagePolicy
) -> Iterator[tuple[list[tuple[str, ImageRecord]], Tensor]]:
    """Images of one size and their pixels [B, 3, H, W], read ahead in threads."""

    def load(one: tuple[str, ImageRecord]) -> tuple[tuple[str, ImageRecord], Tensor | BrokenImage]:
        try:
            return one, to_pixels(one[1].picture())
        except BrokenImage as error:
            return one, error

    def intact() -> Iterator[tuple[tuple[str, ImageRecord], Tensor]]:
        for one, pixels in ahead(load, keyed):
            if isinstance(pixels, BrokenImage):
                broken.report(pixels)
            else:
                yield one, pixels

    for _, alike in groupby(intact(), key=lambda loaded: loaded[0][1].fit.size):
        for part in _parts(alike, batch_size):
            yield [one for one, _ in part], torch.stack([pixels for _, pixels in part])


def _parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    while part := list(islice(remaining, size)):
        yield part


def _key(model: ImageEncoder, *parts: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, model.hash, *parts]).encode()).hexdigest()
