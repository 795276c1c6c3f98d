"""Batches addressed by step, of images or of cached latents, in orders drawn by a counter-based generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from erasediff.data.digits import Images
from erasediff.data.latent_cache import CachedImages
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff_kernels import philox_bits


class Stream(IntEnum):
    """The two streams of batches of a run; each has its own order and its own label dropout."""

    RETAIN = 0
    FORGET = 1

    def random_uint32(self, ids: Tensor, *, seed: int, step: int, role: NoiseRole) -> Tensor:
        """int64 [B]: uniform random numbers in [0, 2^32) of this stream, by Philox, one for each of ``ids`` [B]."""
        return philox_bits(ids, noise_key(seed, step, ids.device), int(role), len(Stream))[:, self]


class GlobalBatches:
    """Batches of images in memory, a function of (seed, stream, step) alone.

    The images are laid end to end in epochs, each a fresh permutation; the batch of ``step`` is the ``batch_size``
    images from position ``step * batch_size`` on. A set smaller than a batch repeats within it. Each rank takes its
    slice of the same global batch, so a run sees the same images whatever its world size.

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
        if len(images) == 0 or batch_size < 1:
            raise ValueError(f"batches need images and a positive size, got {len(images)} and {batch_size}")
        if not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} cannot be divided among ranks; got rank {rank} of {world_size}")
        if not 0 <= label_dropout < 1 or (label_dropout > 0 and conditional and null_label is None):
            raise ValueError(f"label_dropout must be in [0, 1) and needs a null_label, got {label_dropout}")
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.stream = stream
        self.slots = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.conditional = conditional
        self.label_dropout = label_dropout
        self.null_label = null_label
        self._permutations: dict[int, Tensor] = {}

    def at(self, step: int) -> dict[str, Tensor]:
        """This rank's part of the batch of ``step``: n = batch_size / world_size images.

        Returns:
            ``"sample"`` [n, C, H, W], ``"sample_ids"`` int64 [n], the slots in the global batch, and, if conditional,
            ``"class_labels"`` int64 [n].
        """
        device = self.images.sample.device
        index = self._indices(step)
        slots = torch.arange(self.slots.start, self.slots.stop, device=device)
        batch = {"sample": self.images.sample[index], "sample_ids": slots}
        if self.conditional:
            batch["class_labels"] = self._dropped(self.images.class_labels[index], slots, step)
        return batch

    def _indices(self, step: int) -> Tensor:
        """int64 [B]: the indices of this rank's images of ``step``."""
        size, first = len(self.images), step * self.batch_size + self.slots.start
        epochs = range(first // size, (first + len(self.slots) - 1) // size + 1)
        cached = self._permutations
        permutations = {e: cached[e] if e in cached else self._permutation(e) for e in epochs}
        self._permutations = permutations
        order = torch.cat(list(permutations.values()))
        return order[first - epochs.start * size :][: len(self.slots)]

    def _permutation(self, epoch: int) -> Tensor:
        """int64 [N]: the order of the images in ``epoch``."""
        device = self.images.sample.device
        ids = torch.arange(len(self.images), device=device)
        return self.stream.random_uint32(ids, seed=self.seed, step=epoch, role=NoiseRole.ORDER).argsort(stable=True)

    def _dropped(self, class_labels: Tensor, slots: Tensor, step: int) -> Tensor:
        if self.label_dropout == 0 or self.null_label is None:
            return class_labels
        random = self.stream.random_uint32(slots, seed=self.seed, step=step, role=NoiseRole.LABEL_DROPOUT)
        return torch.where(random < round(self.label_dropout * 2**32), self.null_label, class_labels)


class BucketOrder:
    """Order of images in batches of one size each (aspect-ratio bucketing).

    In a round of N steps, N images in all, a bucket of n images has n batches, in a fresh order each round; the images
    of a bucket are laid end to end in epochs, each a fresh permutation, and its batches cut from that. So each image is
    shown ``batch_size`` times in N steps, and any step can be looked up without replaying those before it.

    Args:
        buckets: int64 [N], the bucket of each image, numbered from 0.
        batch_size: of the global batch.
        seed: of the order.
        stream: retain and forget batches are drawn independently.
    """

    def __init__(self, buckets: Tensor, batch_size: int, *, seed: int, stream: Stream) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.stream = stream
        self._buckets = buckets
        self._members = [(buckets == bucket).nonzero()[:, 0] for bucket in range(int(buckets.max()) + 1)]
        self._round: tuple[int, Tensor, Tensor] | None = None
        self._permutation = lru_cache(maxsize=2 * len(self._members))(self._permutation_of)

    def at(self, step: int) -> Tensor:
        """int64 [batch_size]: the images of the global batch of ``step``, all of one bucket."""
        bucket, number = self._bucket_batch(step)
        members = self._members[bucket]
        first = number * self.batch_size
        epochs = range(first // len(members), (first + self.batch_size - 1) // len(members) + 1)
        order = torch.cat([self._permutation(bucket, epoch) for epoch in epochs])
        return order[first - epochs.start * len(members) :][: self.batch_size]

    def _bucket_batch(self, step: int) -> tuple[int, int]:
        """The bucket of ``step``, and how many batches that bucket has had before."""
        size = len(self._buckets)
        round_number, position = divmod(step, size)
        cached = self._round
        if cached is None or cached[0] != round_number:
            order = self._buckets[self._shuffled(torch.arange(size), round_number, NoiseRole.BUCKET_ORDER)]
            earlier = torch.empty_like(order)
            for bucket, members in enumerate(self._members):
                earlier[order == bucket] = torch.arange(len(members))
            self._round = cached = round_number, order, earlier
        _, order, earlier = cached
        bucket = int(order[position])
        return bucket, round_number * len(self._members[bucket]) + int(earlier[position])

    def _permutation_of(self, bucket: int, epoch: int) -> Tensor:
        members = self._members[bucket]
        return members[self._shuffled(members, epoch, NoiseRole.ORDER)]

    def _shuffled(self, ids: Tensor, step: int, role: NoiseRole) -> Tensor:
        """int64 [B]: a permutation of 0..B-1, drawn for ``ids`` [B]."""
        return self.stream.random_uint32(ids, seed=self.seed, step=step, role=role).argsort(stable=True)


class CachedBatches:
    """Batches of cached latents and embeddings, a function of (seed, stream, step) alone, each of images of one size.

    Each rank takes its slice of the same global batch, so a run sees the same images, flips and dropped captions
    whatever its world size. Where mirror images are cached, an image is flipped with probability one half.

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
        if batch_size < 1 or not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} cannot be divided among ranks; got rank {rank} of {world_size}")
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be in [0, 1], got {caption_dropout}")
        if caption_dropout > 0 and images.labelled and images.null_label is None:
            raise ValueError("labels can only be dropped for a model with a null label")
        self.images = images
        self.seed = seed
        self.stream = stream
        self.slots = torch.arange(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.caption_dropout = caption_dropout
        self.device = device
        self.dtype = dtype
        self._order = BucketOrder(images.buckets, batch_size, seed=seed, stream=stream)

    def at(self, step: int) -> dict[str, Tensor]:
        """This rank's part of the batch of ``step``: n = batch_size / world_size samples.

        Returns:
            ``"sample"`` [n, C, h, w], ``"sample_ids"`` int64 [n], the slots in the global batch, and the condition
            tensors of the model's ``encode_prompts`` and ``size_condition``, or ``"class_labels"``, a row for each
            sample. Samples that are cached as uint8 images are floating point in [-1, 1].
        """
        flipped = self._drawn(step, NoiseRole.FLIP, 0.5 if self.images.mirrored else 0.0)
        dropped = self._drawn(step, NoiseRole.LABEL_DROPOUT, self.caption_dropout)
        entries = [self.images.entries[number] for number in self._order.at(step)[self.slots].tolist()]
        rows = [
            self.images.row(entry, flipped=is_flipped, dropped=is_dropped)
            for entry, is_flipped, is_dropped in zip(entries, flipped, dropped, strict=True)
        ]
        batch = stacked(rows, self.device, self.dtype) | {"sample_ids": self.slots.to(self.device, non_blocking=True)}
        if batch["sample"].dtype == torch.uint8:
            batch["sample"] = batch["sample"].to(self.dtype) / 127.5 - 1
        return batch

    def _drawn(self, step: int, role: NoiseRole, probability: float) -> list[bool]:
        """For each slot of this rank, whether an event of this probability happens at ``step``."""
        random = self.stream.random_uint32(self.slots, seed=self.seed, step=step, role=role)
        drawn: list[bool] = (random < round(probability * 2**32)).tolist()
        return drawn


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
