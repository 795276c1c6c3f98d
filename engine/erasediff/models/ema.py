"""Exponential moving averages of the weights, as the optimizer keeps them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD


@contextmanager
def ema_weights(optimizer: ConstrainedAdamW | ConstrainedSGD) -> Iterator[None]:
    """The model holds its averaged weights within the block, for sampling or saving, and its own again after it.

    Parameters without an average (none was asked for, or no step was taken) keep their weights.
    """
    pairs = list(optimizer.ema_parameters())
    with torch.no_grad():
        own = [parameter.detach().clone() for parameter, _ in pairs]
        for parameter, average in pairs:
            parameter.copy_(average)
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), weights in zip(pairs, own, strict=True):
                parameter.copy_(weights)
