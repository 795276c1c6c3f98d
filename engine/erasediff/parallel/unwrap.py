"""Parameter names of the user's own module, inside of DDP, an engine and torch.compile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from erasediff.parallel.zero.engine import is_engine


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside of DDP, a DeepSpeed engine and torch.compile."""
    inside: Any = model
    while True:
        if isinstance(inside, DistributedDataParallel) or is_engine(inside):
            inside = inside.module
        elif isinstance(inside, torch._dynamo.OptimizedModule):
            inside = inside._orig_mod
        else:
            return inside  # type: ignore[no-any-return]


def named(model: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    """``parameters``, which are ``model``'s, by their names. ``ValueError`` for one that is not."""
    names = {parameter: name for name, parameter in unwrapped(model).named_parameters()}
    chosen = {}
    for parameter in parameters:
        if parameter not in names:
            raise ValueError(
                f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that the model does not have: make "
                "the optimizer from the parameters of the model as it is now"
            )
        chosen[names[parameter]] = parameter
    return chosen
