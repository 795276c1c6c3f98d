"""Exponential moving averages of the weights, wherever their shards are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from erasediff.gradients.protocol import Gradients


@contextmanager
def averaged_weights(gradients: Gradients) -> Iterator[None]:
    """The model holds its averaged weights within the block, for sampling or saving, and its own again after it.

    Every process must enter. Weights without an average (``ema_decay`` None) stay. Extra memory: this process's share.
    """
    shards = [shard.tensors for shard in gradients.shards() if "ema" in shard.tensors]
    own = [tensors["weight"].clone() for tensors in shards]
    with torch.no_grad():
        for tensors in shards:
            tensors["weight"].copy_(tensors["ema"])
    gradients.refresh()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensors, weight in zip(shards, own, strict=True):
                tensors["weight"].copy_(weight)
        gradients.refresh()
