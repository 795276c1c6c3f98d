"""The streams of batches that a run draws side by side, each with random numbers of its own."""

from __future__ import annotations

from enum import IntEnum

from torch import Tensor

from erasediff.process import NoiseRole, noise_key
from erasediff_kernels import philox_bits


class Stream(IntEnum):
    """Batches that a run draws side by side; each has an order and a label dropout of its own."""

    RETAIN = 0
    FORGET = 1

    def words(self, ids: Tensor, *, seed: int, step: int, role: NoiseRole) -> Tensor:
        """int64 [B]: this stream's Philox word for each of ``ids`` [B], in [0, 2^32)."""
        return philox_bits(ids, noise_key(seed, step, ids.device), int(role), len(Stream))[:, self]
