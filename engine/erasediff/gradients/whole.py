"""A sharded model's weights as they were before sharding, for those who write them to a file."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from erasediff.distributed import World
from erasediff.gradients.deepspeed import gathered
from erasediff.gradients.naming import unwrapped


@torch.no_grad()
def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole tensor) of each entry of the user's module's ``state_dict``, one at a time.

    On the first process the tensors are on the host, in the model's dtype; on the others they are None. Every process
    must iterate to the end, since a sharded tensor is gathered when its turn comes: no process ever holds two.
    """
    module = unwrapped(model)
    is_main = World.current().is_main
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, DTensor):
            whole = tensor.full_tensor()
            # The copy also waits for the gathering, which is asynchronous.
            yield name, whole.to("cpu", copy=True) if is_main else None
        else:
            with gathered(tensor):
                copy = tensor.detach().cpu().clone() if is_main else None
            yield name, copy
