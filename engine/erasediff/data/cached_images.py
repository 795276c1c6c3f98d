"""Images in the cache: their latents and embeddings as rows of batches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from erasediff.data.encoder_outputs import check_embeddings, check_latents
from erasediff.data.preprocessing import Size
from erasediff.data.survey import content_ids
from erasediff.data.tensor_store import ShardStore

LATENT, MIRRORED = "latent", "mirrored"


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
        number: its place in its data set.
    """

    digest: str
    size: Size
    text: str
    latent: str
    caption: str
    path: str = field(compare=False)
    label: int | None = None
    number: int = field(default=0, compare=False)


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
        chosen: int64 [n], ascending: the places in the data set of the images that were read; None for all of them.
    """

    entries: tuple[Entry, ...]
    null_caption: str
    mirrored: bool
    latents: ShardStore
    captions: ShardStore
    labelled: bool = False
    null_label: int | None = None
    chosen: Tensor | None = None
    _checked: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Keys of rows that were seen to be finite."""

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
        if entry.latent not in self._checked:
            samples = {name: latents[name][None] for name in (LATENT, MIRRORED) if name in latents}
            check_latents(samples, [entry.path])
            self._checked.add(entry.latent)
        condition = {name: tensor for name, tensor in latents.items() if name not in (LATENT, MIRRORED)}
        if self.null_caption:
            condition |= self._embeddings(*((self.null_caption, "") if dropped else (entry.caption, entry.text)))
        if self.labelled:
            condition["class_labels"] = torch.tensor(self.null_label if dropped else entry.label)
        return {"sample": latents[MIRRORED if flipped else LATENT], **condition}

    def _embeddings(self, key: str, text: str) -> dict[str, Tensor]:
        embeddings = self.captions.row(key)
        if key not in self._checked:
            check_embeddings({name: tensor[None] for name, tensor in embeddings.items()}, [text])
            self._checked.add(key)
        return embeddings

    @property
    def numbers(self) -> Tensor | None:
        """int64 [N]: the images' places in the data set, for the order of a part of it; None for the whole."""
        if self.chosen is None:
            return None
        return torch.tensor([entry.number for entry in self.entries], dtype=torch.int64)

    @property
    def buckets(self) -> Tensor:
        """int64 [N]: each image's bucket, numbered from 0 among those that occur."""
        numbers = {size: number for number, size in enumerate(sorted({entry.size for entry in self.entries}))}
        return torch.tensor([numbers[entry.size] for entry in self.entries], dtype=torch.int64)
