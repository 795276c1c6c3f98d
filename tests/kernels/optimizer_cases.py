"""Small optimizers, parameters and constrained steps, for the tests of `erasediff_kernels.optim`."""

from typing import Any

import torch
from torch import Tensor

from erasediff_kernels import (
    ConstrainedAdamW,
    ConstrainedSGD,
    Constraint,
    constraint_multiplier,
    gradient_gram,
)

SHAPES = [(3,), (5, 7), (8, 8)]


def parameters(device: str, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in SHAPES]


def like(params: list[torch.nn.Parameter]) -> list[Tensor]:
    return [torch.randn_like(p) for p in params]


def constrained(optimizer: Any, seed: int) -> Constraint:
    """One constrained step with gradients made from `seed`."""
    torch.manual_seed(seed)
    params = optimizer.parameters_in_order()
    retain, forget = like(params), like(params)
    constraint = constraint_multiplier(gradient_gram(retain, forget), eta=0.5, max_norm=1.0)
    optimizer.constrained_step(retain, forget, constraint)
    return constraint


def same(first: Any, second: Any) -> None:
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p.detach(), q.detach())


def adamw(params: Any, **options: Any) -> ConstrainedAdamW:
    return ConstrainedAdamW(params, **{"lr": 0.01, "weight_decay": 0.1, **options})


def sgd(params: Any, **options: Any) -> ConstrainedSGD:
    return ConstrainedSGD(params, **{"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, **options})
