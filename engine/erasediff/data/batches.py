"""Batches addressed by step, of images in memory or of cached latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from erasediff.data.batch_order import BucketOrder, Stream
from erasediff.data.cached_images import CachedImages
from erasediff.data.digits import Images
from erasediff.diffusion.rng import NoiseRole


class SampleStore(Protocol):
    """Samples that batches are made of."""

    @property
    def buckets(self) -> Tensor:
        """int64 [N]: the bucket of each sample, numbered from 0; the order is drawn on its device."""

    @property
    def numbers(self) -> Tensor | None:
        """int64 [N]: see ``BucketOrder``."""

    @property
    def mirrored(self) -> bool:
        """Whether a sample may be flipped."""

    def batch(self, index: Tensor, flipped: Tensor | None, dropped: Tensor | None) -> dict[str, Tensor]:
        """A batch of samples of one bucket.

        Args:
            index: int64 [n], on the device of ``buckets``.
            flipped: bool [n], the samples to take the mirror image of; None for none of them.
            dropped: bool [n], the samples to take the empty prompt or the null label for; None for none of them.

        Returns:
            ``"sample"`` [n, C, h, w] and the condition tensors, a row for each sample.
        """


class SampleBatches:
    """Batches of samples, a function of (seed, stream, step) alone, each of samples of one size.

    The order is that of ``BucketOrder``. Each rank takes its slice of the same global batch, so a run sees the same
    samples, flips and dropped conditions whatever its world size. Where a store has mirror images, a sample is flipped
    with probability one half.

    Args:
        store: the samples.
        batch_size: of the global batch; a multiple of ``world_size``.
        seed: of order, flips and dropout.
        stream: retain and forget batches are drawn independently.
        dropout: probability that a sample loses its condition (classifier-free guidance, Ho & Salimans 2022).
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        store: SampleStore,
        batch_size: int,
        *,
        seed: int,
        stream: Stream,
        dropout: float,
        rank: int,
        world_size: int,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} cannot be divided among ranks; got rank {rank} of {world_size}")
        self.seed = seed
        self.stream = stream
        self.dropout = dropout
        self.order = BucketOrder(store.buckets, batch_size, seed=seed, stream=stream, numbers=store.numbers)
        self._store = store
        slots = torch.arange(batch_size, device=self.order.device)
        self._share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._slots = slots[self._share]

    def at(self, step: int) -> dict[str, Tensor]:
        """This rank's part of the batch of ``step``: n = batch_size / world_size samples.

        Returns:
            ``"sample"`` [n, C, h, w], ``"sample_ids"`` int64 [n], the slots in the global batch, and the condition
            tensors: those of the model's ``encode_prompts`` and ``size_condition``, or ``"class_labels"`` int64 [n].
        """
        flipped = self._drawn(step, NoiseRole.FLIP, 0.5 if self._store.mirrored else 0.0)
        dropped = self._drawn(step, NoiseRole.LABEL_DROPOUT, self.dropout)
        batch = self._store.batch(self.order.at(step)[self._share], flipped, dropped)
        return batch | {"sample_ids": self._slots.to(batch["sample"].device, non_blocking=True)}

    def _drawn(self, step: int, role: NoiseRole, probability: float) -> Tensor | None:
        """bool [n]: for each slot of this rank, whether an event of this probability happens at ``step``."""
        if probability == 0:
            return None
        random = self.stream.random_uint32(self._slots, seed=self.seed, step=step, role=role)
        return random < round(probability * 2**32)


class GlobalBatches(SampleBatches):
    """Batches of images in memory: see ``SampleBatches``.

    Args:
        images: on the device of the batches.
        batch_size: of the global batch; a multiple of ``world_size``.
        seed: of order and label dropout.
        stream: retain and forget batches are drawn independently.
        rank: of this process.
        world_size: number of processes.
        conditional: whether batches carry ``"class_labels"``.
        label_dropout: probability that a label becomes ``null_label`` (classifier-free guidance, Ho & Salimans 2022).
        null_label: the label of the unconditional model.

    Raises:
        ValueError: for sizes that do not fit, and label dropout without a null label.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int,
        stream: Stream = Stream.RETAIN,
        rank: int = 0,
        world_size: int = 1,
        conditional: bool = True,
        label_dropout: float = 0.0,
        null_label: int | None = None,
    ) -> None:
        if len(images) == 0:
            raise ValueError("batches need images, got none")
        if not 0 <= label_dropout < 1 or (label_dropout > 0 and conditional and null_label is None):
            raise ValueError(f"label_dropout must be in [0, 1) and needs a null_label, got {label_dropout}")
        dropout = label_dropout if conditional and null_label is not None else 0.0
        store = _ImageTensors(images, conditional=conditional, null_label=null_label)
        super().__init__(store, batch_size, seed=seed, stream=stream, dropout=dropout, rank=rank, world_size=world_size)
        self.images = images


class CachedBatches(SampleBatches):
    """Batches of cached latents and embeddings: see ``SampleBatches``.

    Args:
        images: in the cache.
        batch_size: of the global batch; a multiple of ``world_size``.
        seed: of order, flips and caption dropout.
        stream: retain and forget batches are drawn independently.
        caption_dropout: probability that an image has the empty prompt or the null label (Ho & Salimans 2022).
        rank: of this process.
        world_size: number of processes.
        device: of the batches.
        dtype: of every floating-point tensor in the batches.

    Raises:
        ValueError: for sizes that do not fit, and a probability outside [0, 1].
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
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be in [0, 1], got {caption_dropout}")
        if caption_dropout > 0 and images.labelled and images.null_label is None:
            raise ValueError("labels can only be dropped for a model with a null label")
        super().__init__(
            _CachedRows(images, device, dtype),
            batch_size,
            seed=seed,
            stream=stream,
            dropout=caption_dropout,
            rank=rank,
            world_size=world_size,
        )
        self.images = images


class _ImageTensors:
    """Images in memory as samples."""

    numbers = None
    mirrored = False

    def __init__(self, images: Images, *, conditional: bool, null_label: int | None) -> None:
        self.buckets = torch.zeros(len(images), dtype=torch.int64, device=images.sample.device)
        self._images = images
        self._conditional = conditional
        self._null_label = null_label

    def batch(self, index: Tensor, flipped: Tensor | None, dropped: Tensor | None) -> dict[str, Tensor]:
        batch = {"sample": self._images.sample[index]}
        if self._conditional:
            labels = self._images.class_labels[index]
            if dropped is not None:
                assert self._null_label is not None
                labels = torch.where(dropped, self._null_label, labels)
            batch["class_labels"] = labels
        return batch


class _CachedRows:
    """Images in the cache as samples; those that are cached as uint8 are floating point in [-1, 1]."""

    def __init__(self, images: CachedImages, device: torch.device | str, dtype: torch.dtype) -> None:
        self.buckets = images.buckets
        self.numbers = images.numbers
        self.mirrored = images.mirrored
        self._images = images
        self._device = device
        self._dtype = dtype

    def batch(self, index: Tensor, flipped: Tensor | None, dropped: Tensor | None) -> dict[str, Tensor]:
        entries = [self._images.entries[number] for number in index.tolist()]
        rows = [
            self._images.row(entry, flipped=is_flipped, dropped=is_dropped)
            for entry, is_flipped, is_dropped in zip(
                entries, _listed(flipped, len(entries)), _listed(dropped, len(entries)), strict=True
            )
        ]
        batch = stacked(rows, self._device, self._dtype)
        if batch["sample"].dtype == torch.uint8:
            batch["sample"] = batch["sample"].to(self._dtype) / 127.5 - 1
        return batch


def _listed(events: Tensor | None, count: int) -> list[bool]:
    return [False] * count if events is None else events.tolist()


def stacked(
    rows: Sequence[Mapping[str, Tensor]], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A batch of rows that lie on the host.

    Nothing waits for a GPU: rows are stacked in pinned memory, which the copy may read later.

    Args:
        rows: [...] by name, of the same names, shapes and dtypes.
        device: where the batch is to lie.
        dtype: of its floating-point tensors.

    Returns:
        [B, ...] by name.
    """
    to_gpu = torch.device(device).type == "cuda"

    def stack(tensors: list[Tensor]) -> Tensor:
        batch = torch.empty(len(tensors), *tensors[0].shape, dtype=tensors[0].dtype, pin_memory=to_gpu)
        torch.stack(tensors, out=batch)
        # Two steps: a copy that also converts would convert on the host, to memory that is not pinned.
        batch = batch.to(device, non_blocking=True)
        return batch.to(dtype) if batch.is_floating_point() else batch

    return {name: stack([row[name] for row in rows]) for name in rows[0]}
