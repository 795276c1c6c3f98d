"""Content-addressed cache of VAE latents and text embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor

from erasediff.data.cached_images import LATENT, MIRRORED, CachedImages, Entry
from erasediff.data.encoder_outputs import check_latents, encode_prompts
from erasediff.data.encoders import Encoders, ImageEncoder
from erasediff.data.image_folder import CaptionedImage
from erasediff.data.preprocessing import BrokenImage, Buckets, to_pixels
from erasediff.data.survey import BrokenImagePolicy, ImageRecord, ahead, survey
from erasediff.data.tensor_store import ShardStore
from erasediff.errors import UserError
from erasediff.utils.progress import progress_bar

FORMAT = 1
NULL_CAPTION = ""

T = TypeVar("T")


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
        chosen: Tensor | None = None,
    ) -> CachedImages:
        """``encode`` for a model without prompts: captions are left out, and rows have class labels if ``labelled``."""
        keyed = [(_key(model, item.digest, item.fit, mirror), item) for item in records]
        with torch.no_grad():
            self._fill_latents(dict(keyed), model, mirror, batch_size, broken, console)
        entries = tuple(
            Entry(item.digest, item.fit.size, "", key, "", str(item.image.path), item.image.label, item.number)
            for key, item in keyed
            if key in self.latents
        )
        if not entries:
            raise UserError("No image is left to learn from: none was given, or all are broken.")
        return CachedImages(entries, "", mirror, self.latents, self.captions, labelled, null_label, chosen)

    def encode(
        self,
        records: Sequence[ImageRecord],
        model: Encoders,
        broken: BrokenImagePolicy,
        console: Console,
        *,
        mirror: bool = False,
        batch_size: int = 8,
        chosen: Tensor | None = None,
    ) -> CachedImages:
        """``fill`` for images that were surveyed already; ``chosen`` are their places, if they are not all."""
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
                number=item.number,
            )
            for key, item in keyed
            if key in self.latents
        )
        if not entries:
            raise UserError("No image is left to learn from: none was given, or all are broken.")
        return CachedImages(entries, captions[NULL_CAPTION], mirror, self.latents, self.captions, chosen=chosen)

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
