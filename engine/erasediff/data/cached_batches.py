"""Batches of cached latents, addressed by step like ``GlobalBatches``."""

from __future__ import annotations

import torch
from torch import Tensor

from erasediff.data.latents import LATENT, MIRRORED, CachedImages
from erasediff.data.order import BucketOrder
from erasediff.data.stream import Stream
from erasediff.process import NoiseRole


class CachedBatches:
    """The batches of one stream, a function of (seed, stream, step) alone, each of images of one size.

    Each rank takes its slice of the same global batch, so a run sees the same images, flips and dropped captions
    whatever its world size. Where mirror images are cached, an image is flipped with probability one half.

    batch_size:      of the global batch; a multiple of ``world_size``
    caption_dropout: probability that an image has the empty prompt instead (Ho & Salimans 2022)
    dtype:           of every floating-point tensor in the batches

    Raises ``ValueError`` for sizes that do not fit, and a probability outside [0, 1].
    """

    def __init__(
        self,
        images: CachedImages,
        batch_size: int,
        *,
        seed: int,
        stream: Stream = Stream.RETAIN,
        caption_dropout: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} cannot be cut for rank {rank} of {world_size}")
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be in [0, 1], got {caption_dropout}")
        self.images = images
        self.seed = seed
        self.stream = stream
        self.slots = torch.arange(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.caption_dropout = caption_dropout
        self.device = device
        self.dtype = dtype
        self._order = BucketOrder(images.buckets, batch_size, seed=seed, stream=stream)

    def at(self, step: int) -> dict[str, Tensor]:
        """This rank's part of the batch of ``step``.

        ``"sample"`` [B, C, h, w], ``"sample_ids"`` int64 [B], the slots in the global batch, and the condition tensors
        of the model's ``encode_prompts`` and ``size_condition``, a row for each sample.
        """
        flipped = self._drawn(step, NoiseRole.FLIP, 0.5 if self.images.mirrored else 0.0)
        dropped = self._drawn(step, NoiseRole.LABEL_DROPOUT, self.caption_dropout)
        numbers = self._order.at(step)[self.slots].tolist()
        rows = [self._row(*row) for row in zip(numbers, flipped, dropped, strict=True)]
        batch = {name: self._placed(torch.stack([row[name] for row in rows])) for name in rows[0]}
        return batch | {"sample_ids": self.slots.to(self.device)}

    def _row(self, number: int, flipped: bool, dropped: bool) -> dict[str, Tensor]:
        entry = self.images.entries[number]
        latents = self.images.latents.row(entry.latent)
        condition = {name: tensor for name, tensor in latents.items() if name not in (LATENT, MIRRORED)}
        caption = self.images.captions.row(self.images.null_caption if dropped else entry.caption)
        return {"sample": latents[MIRRORED if flipped else LATENT], **caption, **condition}

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _drawn(self, step: int, role: NoiseRole, probability: float) -> list[bool]:
        """For each slot of this rank, whether an event of this probability happens at ``step``."""
        words = self.stream.words(self.slots, seed=self.seed, step=step, role=role)
        drawn: list[bool] = (words < round(probability * 2**32)).tolist()
        return drawn
