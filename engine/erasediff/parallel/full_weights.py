"""Full (unsharded) weights of a sharded model, and its averages, for writing them to a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from erasediff.io.atomic import storage_errors
from erasediff.io.tensor_file import ALIGNMENT, tensor_bytes
from erasediff.parallel.gradient_store import GradientStore
from erasediff.parallel.unwrap import unwrapped
from erasediff.parallel.world import World
from erasediff.parallel.zero.engine import gathered
from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD


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


@contextmanager
def averaged_weights(gradients: GradientStore) -> Iterator[None]:
    """The model holds its averaged weights within the block, for sampling or saving, and its own again after it.

    Every process must enter. Weights without an average (``ema_decay`` None) stay. Extra memory: this process's share.
    """
    shards = [shard.tensors for shard in gradients.shards() if "ema" in shard.tensors]
    with _in_place_of([(tensors["weight"], tensors["ema"]) for tensors in shards], gradients.refresh):
        yield


def gather_ema_weights(trained: nn.Module, gradients: GradientStore, folder: Path) -> dict[str, Tensor]:
    """The averaged weights of ``trained`` by name, on the main rank; nothing on the others.

    Every rank must call it. The weights are gathered one at a time, each into a file without a name in ``folder``, and
    what is returned are views of that file: the main rank needs the disk for a whole model, not the memory. UserError
    if the disk is full.
    """
    places: dict[str, tuple[slice, torch.dtype, torch.Size]] = {}
    with storage_errors(folder), TemporaryFile(dir=folder) as file:
        with averaged_weights(gradients):
            for name, tensor in full_weights(trained):
                if tensor is not None:
                    begin = file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
                    places[name] = slice(begin, begin + tensor.nbytes), tensor.dtype, tensor.shape
                    file.write(tensor_bytes(tensor))
                del tensor  # before the next is gathered
        file.flush()
        if not places:
            return {}
        # The mapping outlives the file's only name; what is written to the views stays in memory.
        whole = torch.frombuffer(mmap(file.fileno(), 0, access=ACCESS_COPY), dtype=torch.uint8)
    return {name: whole[place].view(dtype).view(shape) for name, (place, dtype, shape) in places.items()}


def load_full_weights_(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put ``weights`` in the place of what ``network`` has of them, which can then be saved, but not trained.

    Modules that FSDP2 has wrapped are of their own class again: what is saved is named by its class.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            wrapped: Any = next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
            module.__class__ = wrapped
    for name, tensor in weights.items():
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor


@contextmanager
def ema_weights(optimizer: ConstrainedAdamW | ConstrainedSGD) -> Iterator[None]:
    """The model holds its averaged weights within the block, for sampling or saving, and its own again after it.

    Parameters without an average (none was asked for, or no step was taken) keep their weights.
    """
    with _in_place_of(list(optimizer.ema_parameters())):
        yield


@contextmanager
def _in_place_of(pairs: Sequence[tuple[Tensor, Tensor]], refresh: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Each weight holds the value beside it within the block; ``refresh`` is called after weights were written to."""
    with torch.no_grad():
        trained = [weight.detach().clone() for weight, _ in pairs]
        for weight, value in pairs:
            weight.copy_(value)
    refresh()
    try:
        yield
    finally:
        with torch.no_grad():
            for (weight, _), value in zip(pairs, trained, strict=True):
                weight.copy_(value)
        refresh()
