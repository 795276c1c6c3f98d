"""A sharded model's weights as they were before sharding, for those who write them to a file."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from erasediff.distributed import World
from erasediff.gradients.deepspeed import gathered
from erasediff.gradients.naming import unwrapped


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole tensor) of each entry of the user's module's ``state_dict``, one at a time.

    On the first process the tensors are on the host, in the model's dtype; on the others they are None. Every process
    must iterate to the end, since a sharded tensor is gathered when its turn comes, and let go before it is yielded:
    what is not kept takes the memory of one tensor.
    """
    is_main = World.current().is_main
    for name, tensor in unwrapped(model).state_dict(keep_vars=True).items():
        # Nothing holds the copy here (torch.no_grad around a generator would), so that the caller can let go of it
        # before the next is made.
        yield name, _whole(tensor, is_main)


@torch.no_grad()
def _whole(tensor: Tensor, is_main: bool) -> Tensor | None:
    if isinstance(tensor, DTensor):
        whole = tensor.full_tensor()
        # The copy also waits for the gathering, which is asynchronous.
        return whole.to("cpu", copy=True) if is_main else None
    with gathered(tensor):
        return tensor.detach().cpu().clone() if is_main else None
