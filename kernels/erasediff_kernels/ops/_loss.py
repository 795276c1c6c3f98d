"""Autograd of the two losses: the forward pass has already made the gradient, the backward pass only scales it."""

from typing import Any

import torch
from torch import Tensor


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad = output[1]
    ctx.mark_non_differentiable(grad)
    ctx.save_for_backward(grad)
    ctx.arguments = len(inputs)


def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    return grad_loss * grad, *(None,) * (ctx.arguments - 1)


def register(op: str) -> None:
    torch.library.register_autograd(f"erasediff::{op}", backward, setup_context=setup_context)
