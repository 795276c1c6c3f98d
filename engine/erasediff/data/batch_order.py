"""Order of images in batches, drawn by a counter-based generator and addressed by step."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff_kernels import philox_bits


class Stream(IntEnum):
    """The two streams of batches of a run; each has its own order and its own label dropout."""

    RETAIN = 0
    FORGET = 1

    def random_uint32(self, ids: Tensor, *, seed: int, step: int, role: NoiseRole) -> Tensor:
        """int64 [B]: uniform random numbers in [0, 2^32) of this stream, by Philox, one for each of ``ids`` [B]."""
        return philox_bits(ids, noise_key(seed, step, ids.device), int(role), len(Stream))[:, self]

    def permutation(self, ids: Tensor, *, seed: int, step: int, role: NoiseRole) -> Tensor:
        """int64 [B]: a permutation of 0..B-1, drawn for ``ids`` [B]; that of a part of ``ids`` has the same order."""
        return self.random_uint32(ids, seed=seed, step=step, role=role).argsort(stable=True)


def first_shown(size: int, samples: int, *, seed: int, stream: Stream) -> Tensor | None:
    """Numbers of the images that a run of ``samples`` samples sees of a data set, before any image is read.

    They are the first of the data set's order, so a run sees them in the order in which it would see the whole set if
    all images are of one size, and a longer run sees more of them before it sees others. Images of several sizes have
    the order of ``BucketOrder`` among those that are chosen.

    Args:
        size: number of images in the data set.
        samples: steps times the size of a batch.
        seed: of the order.
        stream: retain and forget images are chosen independently.

    Returns:
        int64 [samples], ascending; None for all images.
    """
    if samples >= size:
        return None
    return stream.permutation(torch.arange(size), seed=seed, step=0, role=NoiseRole.ORDER)[:samples].sort().values


class BucketOrder:
    """Order of images in batches of one size each (aspect-ratio bucketing).

    In a round of N steps, N images in all, a bucket of n images has n batches, in a fresh order each round; the images
    of a bucket are laid end to end in epochs, each a fresh permutation, and its batches cut from that. So each image is
    shown ``batch_size`` times in N steps, and any step can be looked up without replaying those before it. A bucket
    smaller than a batch repeats within it.

    Args:
        buckets: int64 [N], the bucket of each image, numbered from 0, on the device of the order.
        batch_size: of the global batch.
        seed: of the order.
        stream: retain and forget batches are drawn independently.
        numbers: int64 [N], ascending: the numbers of the images in the data set that they are a part of, for which
            permutations are drawn; None for 0..N-1.
    """

    def __init__(
        self, buckets: Tensor, batch_size: int, *, seed: int, stream: Stream, numbers: Tensor | None = None
    ) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.stream = stream
        self.device = buckets.device
        self._buckets = buckets
        self._numbers = torch.arange(len(buckets), device=self.device) if numbers is None else numbers
        self._members = [(buckets == bucket).nonzero()[:, 0] for bucket in range(int(buckets.max()) + 1)]
        self._round: tuple[int, Tensor, Tensor] | None = None
        self._permutation = lru_cache(maxsize=2 * len(self._members))(self._permutation_of)

    def at(self, step: int) -> Tensor:
        """int64 [batch_size]: the images of the global batch of ``step``, all of one bucket."""
        bucket, number = self._bucket_batch(step)
        size, first = len(self._members[bucket]), number * self.batch_size
        end = first + self.batch_size
        epochs = range(first // size, (end - 1) // size + 1)
        parts = [self._permutation(bucket, e)[max(first - e * size, 0) : min(end - e * size, size)] for e in epochs]
        return torch.cat(parts)

    @property
    def num_buckets(self) -> int:
        return len(self._members)

    def shown(self, steps: int) -> int:
        """Number of images in the batches of the first ``steps`` steps."""
        if steps >= len(self._buckets):
            return len(self._buckets)
        order, _ = self._round_of(0)
        batches = order[:steps].bincount(minlength=len(self._members)).tolist()
        return sum(min(len(own), n * self.batch_size) for own, n in zip(self._members, batches, strict=True))

    def steps_to_show_all(self) -> int:
        """Number of steps after which each image was in a batch."""
        order, earlier = self._round_of(0)
        batches = torch.tensor([-(-len(members) // self.batch_size) for members in self._members], device=self.device)
        return int((earlier == batches[order] - 1).nonzero().max()) + 1

    def _bucket_batch(self, step: int) -> tuple[int, int]:
        """The bucket of ``step``, and how many batches that bucket has had before."""
        if len(self._members) == 1:
            # Nothing is read from the device.
            return 0, step
        round_number, position = divmod(step, len(self._buckets))
        order, earlier = self._round_of(round_number)
        bucket = int(order[position])
        return bucket, round_number * len(self._members[bucket]) + int(earlier[position])

    def _round_of(self, number: int) -> tuple[Tensor, Tensor]:
        """The bucket of each step of a round, int64 [N], and how many batches that had before in the round."""
        if self._round is None or self._round[0] != number:
            size = len(self._buckets)
            order = self._buckets[
                self._shuffled(torch.arange(size, device=self.device), number, NoiseRole.BUCKET_ORDER)
            ]
            earlier = torch.empty_like(order)
            for bucket, members in enumerate(self._members):
                earlier[order == bucket] = torch.arange(len(members), device=self.device)
            self._round = number, order, earlier
        return self._round[1:]

    def _permutation_of(self, bucket: int, epoch: int) -> Tensor:
        members = self._members[bucket]
        return members[self._shuffled(self._numbers[members], epoch, NoiseRole.ORDER)]

    def _shuffled(self, ids: Tensor, step: int, role: NoiseRole) -> Tensor:
        return self.stream.permutation(ids, seed=self.seed, step=step, role=role)
