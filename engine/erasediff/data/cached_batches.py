"""Batches of cached latents, addressed by step like ``GlobalBatches``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from erasediff.data.latents import CachedImages
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
        entries = [self.images.entries[number] for number in self._order.at(step)[self.slots].tolist()]
        rows = [
            self.images.row(entry, flipped=is_flipped, dropped=is_dropped)
            for entry, is_flipped, is_dropped in zip(entries, flipped, dropped, strict=True)
        ]
        return stacked(rows, self.device, self.dtype) | {"sample_ids": self.slots.to(self.device)}

    def _drawn(self, step: int, role: NoiseRole, probability: float) -> list[bool]:
        """For each slot of this rank, whether an event of this probability happens at ``step``."""
        words = self.stream.words(self.slots, seed=self.seed, step=step, role=role)
        drawn: list[bool] = (words < round(probability * 2**32)).tolist()
        return drawn


def stacked(
    rows: Sequence[Mapping[str, Tensor]], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """``rows`` of the same entries as a batch on ``device``; floating-point entries in ``dtype``."""

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return {name: placed(torch.stack([row[name] for row in rows])) for name in rows[0]}
