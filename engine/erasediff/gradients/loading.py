"""A model that is partitioned (ZeRO-3) as it is made, for checkpoints larger than a process's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from erasediff.distributed import World
from erasediff.gradients.deepspeed import gathered


@torch.no_grad()
def partitioned_module(
    make: Callable[[], nn.Module],
    read: Callable[[str], Tensor],
    config: dict[str, Any],
) -> nn.Module:
    """``make()``'s module for ``deepspeed.initialize`` with the same ZeRO-3 ``config``, with the weights of ``read``,
    in bf16 if ``config`` enables that, else in fp32.

    make: builds the network, whose values do not matter: each submodule is partitioned as soon as it is there
    read: name -> whole tensor, of any device and floating dtype. For a parameter it is called on the first process
          only, for a buffer on each; one tensor is held at a time

    The trained weights of a diffusers folder, lazily: ``safetensors.safe_open(path, "pt").get_tensor``.
    """
    import deepspeed

    with torch.enable_grad(), deepspeed.zero.Init(config_dict_or_path=config):
        module = make()
    is_main = World.current().is_main
    for name, parameter in module.named_parameters():
        with gathered(parameter, modified_by=0):
            if is_main:
                parameter.copy_(read(name))
    for name, entry in module.state_dict(keep_vars=True).items():
        if not isinstance(entry, nn.Parameter):
            entry.copy_(read(name))
    return module
