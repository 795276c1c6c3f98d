"""Parameter-by-parameter partitioning (ZeRO-3) of checkpoints larger than a process's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from erasediff.parallel.world import World
from erasediff.parallel.zero.engine import gathered, partitioner

UNIT_ELEMENTS = 50_000_000
"""Elements that a frozen model gathers at once: as many as DeepSpeed prefetches by default."""


def partitioned_module(
    make: Callable[[], nn.Module],
    read: Callable[[str], Tensor],
    config: dict[str, Any],
) -> nn.Module:
    """``make()``'s module for ``deepspeed.initialize`` with the same ZeRO-3 ``config``, with the weights of ``read``,
    in bf16 if ``config`` enables that, else in fp32.

    make: builds the network, of which no parameter is allocated
    read: name -> whole tensor, of any device and floating dtype. For a parameter it is called on the first process
          only, for a buffer on each; one tensor is held at a time

    The trained weights of a diffusers folder, lazily: ``safetensors.safe_open(path, "pt").get_tensor``.
    """
    with init_empty_weights(include_buffers=False):
        module = make()
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") is True else torch.float32
    nn.Module.to(module, dtype)
    partition(module, read, config)
    with torch.no_grad():
        for name, entry in module.state_dict(keep_vars=True).items():
            if not isinstance(entry, nn.Parameter):
                entry.copy_(read(name))
    return module


def partition(module: nn.Module, read: Callable[[str], Tensor], config: dict[str, Any]) -> None:
    """Cut each parameter of ``module`` as ZeRO-3 under ``config`` does; ``read`` gives the values of those that are on
    the meta device, as in ``partitioned_module``, the first process's values count for the others.

    Parameters that had no storage are new objects afterwards: optimizers must be made after this.
    """
    is_main = World.current().is_main
    cut = partitioner(config)
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            owner, _, leaf = name.rpartition(".")
            whole = nn.Parameter(
                read(name).to(parameter.dtype) if is_main else empty, requires_grad=parameter.requires_grad
            )
            module.get_submodule(owner)._parameters[leaf] = whole
            parameter = whole
        cut(parameter)


def gather_in_forward(module: nn.Module) -> None:
    """Let a partitioned ``module`` without an engine compute: each part of it is whole while it runs.

    For a frozen model, under ``no_grad``. Parts hold ``UNIT_ELEMENTS`` at most, or one module's own parameters.
    """
    open_blocks: dict[nn.Module, AbstractContextManager[object]] = {}

    def enter(part: nn.Module, parameters: list[nn.Parameter]) -> None:
        block = gathered(*parameters)
        block.__enter__()
        open_blocks[part] = block

    def leave(part: nn.Module, *_: object) -> None:
        if (block := open_blocks.pop(part, None)) is not None:
            block.__exit__(None, None, None)

    for part, parameters in _units(module):
        part.register_forward_pre_hook(lambda part, _, parameters=parameters: enter(part, parameters))
        # After a pass that raised too.
        part.register_forward_hook(leave, always_call=True)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    whole = list(module.parameters())
    is_called = not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    if is_called and whole and sum(_size(parameter) for parameter in whole) <= UNIT_ELEMENTS:
        yield module, whole
        return
    own = list(module.parameters(recurse=False))
    if own:
        yield module, own
    for child in module.children():
        yield from _units(child)


def _size(parameter: Any) -> int:
    return int(parameter.ds_numel) if hasattr(parameter, "ds_id") else int(parameter.numel())
