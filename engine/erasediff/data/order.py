"""The order of batches that are one bucket each, a function of (seed, stream, step) alone."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from erasediff.data.stream import Stream
from erasediff.process import NoiseRole


class BucketOrder:
    """Which images the batch of a step holds.

    In a round of N steps, N images in all, a bucket of n images has n batches, in a fresh order each round; the images
    of a bucket are laid end to end in epochs, each a fresh permutation, and its batches cut from that. So each image is
    shown ``batch_size`` times in N steps, and any step can be looked up without replaying those before it.

    buckets: int64 [N], the bucket of each image, numbered from 0
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
        bucket, turn = self._turn(step)
        members = self._members[bucket]
        first = turn * self.batch_size
        epochs = range(first // len(members), (first + self.batch_size - 1) // len(members) + 1)
        order = torch.cat([self._permutation(bucket, epoch) for epoch in epochs])
        return order[first - epochs.start * len(members) :][: self.batch_size]

    def _turn(self, step: int) -> tuple[int, int]:
        """The bucket of ``step``, and how many batches that bucket has had before."""
        size = len(self._buckets)
        number, place = divmod(step, size)
        if self._round is None or self._round[0] != number:
            order = self._buckets[self._shuffled(torch.arange(size), number, NoiseRole.BUCKET_ORDER)]
            earlier = torch.empty_like(order)
            for bucket, members in enumerate(self._members):
                earlier[order == bucket] = torch.arange(len(members))
            self._round = number, order, earlier
        _, order, earlier = self._round
        bucket = int(order[place])
        return bucket, number * len(self._members[bucket]) + int(earlier[place])

    def _permutation_of(self, bucket: int, epoch: int) -> Tensor:
        members = self._members[bucket]
        return members[self._shuffled(members, epoch, NoiseRole.ORDER)]

    def _shuffled(self, ids: Tensor, step: int, role: NoiseRole) -> Tensor:
        """int64 [B]: a permutation of 0..B-1, drawn for ``ids`` [B]."""
        return self.stream.words(ids, seed=self.seed, step=step, role=role).argsort(stable=True)
