"""Bytes that a step under FSDP2 communicates, with the denoiser of the tests of gradients; a rank that fails alone."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import torch
from cases import BARRIERS, batches, denoiser, process, unlearner
from checkpoint_cases import peers
from failure_cases import Failure, denoiser_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erasediff import EraseDiff
from erasediff.config import DistributedConfig
from erasediff.parallel import recovery
from erasediff.parallel.fsdp import FSDPGradientStore
from erasediff.parallel.world import World
from erasediff.parallel.wrap import shard
from erasediff_kernels import ConstrainedAdamW


class CollectiveBytes(TorchDispatchMode):
    """``bytes``: by kind and dtype, what each collective's whole tensors hold."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = next((kind for kind in ("allgather", "reduce_scatter") if kind in func.__name__), "other")
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            largest = max(tensors, key=Tensor.numel, default=torch.empty(0))
            self.bytes[kind, largest.dtype] += largest.nbytes
        return func(*args, **(kwargs or {}))


def communicated(autocast: torch.dtype | None, max_live_parameters: int) -> dict[tuple[str, torch.dtype], float]:
    """Bytes for each parameter of the model in the second step, by kind of collective and dtype."""
    peers()
    model = denoiser()
    numel = sum(parameter.numel() for parameter in model.parameters())
    shard(model, DistributedConfig(launch="fsdp"), autocast)
    optimizer = ConstrainedAdamW(model.parameters(), lr=1e-4)
    gradients = FSDPGradientStore(model, optimizer, max_live_parameters=max_live_parameters)
    method = EraseDiff(
        model, optimizer, process=process(), barrier=BARRIERS["norm"], gradients=gradients, autocast=autocast
    )
    world = World.current()
    method.step(*batches(0, world))
    with CollectiveBytes() as collectives:
        method.step(*batches(1, world))
    return {key: count / numel for key, count in collectives.bytes.items() if key[0] != "other"}


def alone(options: dict[str, Any]) -> str:
    """Error of the last rank, which fails alone in a step, while the others wait for it to try again."""
    method = unlearner(**options)
    world = World.current()
    method.step(*batches(0, world))
    if world.rank != world.size - 1:
        return "waited"
    Failure(denoiser_of(method).mid_block, "forward", 1, torch.OutOfMemoryError)
    with mock.patch.object(recovery, "RETRY_SECONDS", 1.0):
        for _ in range(2):
            try:
                method.step(*batches(1, world))
            except torch.OutOfMemoryError:
                continue
            except RuntimeError as error:
                return str(error)
    return "nothing"
