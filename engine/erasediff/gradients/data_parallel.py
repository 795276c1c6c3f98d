"""Gradients that ``DistributedDataParallel`` averages: every process holds all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from erasediff.distributed import World
from erasediff.gradients.local import LocalGradients


class DataParallelGradients(LocalGradients):
    """``Gradients`` of a model in DDP. Every backward pass but the last of a gradient stays in its process."""

    def __init__(self, model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer, World.current())
        self._ddp = model
        self._calls_left = 1

    def begin(self, calls: int) -> None:
        self._calls_left = calls
        # What DDP.no_sync sets; a context manager would have to span the model's forward passes.
        self._ddp.require_backward_grad_sync = calls == 1

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self._calls_left -= 1
        self._ddp.require_backward_grad_sync = self._calls_left <= 1

    def take(self) -> list[Tensor]:
        taken = super().take()
        # The next backward pass writes to DDP's buckets, which these are views of.
        return [gradient.clone() for gradient in taken] if self._ddp.gradient_as_bucket_view else taken
