"""Gradient store factory: local, DDP, FSDP2 or ZeRO, by the type of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from erasediff.parallel.fsdp import FSDPGradientStore
from erasediff.parallel.gradient_store import GradientStore
from erasediff.parallel.replicated import DataParallelGradientStore, LocalGradientStore
from erasediff.parallel.world import World
from erasediff.parallel.zero.engine import is_engine
from erasediff.parallel.zero.gradients import ZeroGradientStore


def gradients_for(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, own_reduction: bool = True
) -> GradientStore:
    """``GradientStore`` of a plain module, one in DDP, one after ``fully_shard``, or of a DeepSpeed engine.

    Args:
        model: What is trained.
        optimizer: None for an engine, which has its own; the wrappers of ``accelerate`` are seen through.
        own_reduction: Of an engine: False for DeepSpeed's own reduction of gradients and gathering of weights.

    Raises:
        ValueError: A combination that cannot train, with what to do about it.
    """
    if is_engine(model):
        return ZeroGradientStore(model, own_reduction=own_reduction)
    optimizer = _unwrap_accelerate(optimizer)
    if optimizer is None:
        raise ValueError("give the optimizer of the model's parameters; only a DeepSpeed engine brings its own")
    if isinstance(model, torch._dynamo.OptimizedModule):
        inside: nn.Module = model._orig_mod
    else:
        inside = model
    if isinstance(inside, DistributedDataParallel):
        return DataParallelGradientStore(inside, optimizer)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return FSDPGradientStore(model, optimizer)
    size = World.current().size
    if size > 1:
        raise ValueError(
            f"there are {size} processes, but this model's gradients would stay in each: wrap it in "
            "torch.nn.parallel.DistributedDataParallel, apply fully_shard to it, or give a DeepSpeed engine"
        )
    return LocalGradientStore(model, optimizer)


def _unwrap_accelerate(optimizer: Any) -> torch.optim.Optimizer | None:
    if type(optimizer).__module__.partition(".")[0] != "accelerate":
        return optimizer  # type: ignore[no-any-return]
    if optimizer.scaler is not None:
        raise ValueError("float16 with a loss scaler is not supported: use mixed_precision='bf16', which needs none")
    return optimizer.optimizer  # type: ignore[no-any-return]
