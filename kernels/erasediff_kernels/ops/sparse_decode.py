"""Decoding a sparse code without the product of an n-wide matrix that is almost all zeros, and its backward pass."""

from typing import Any

import torch
from torch import Tensor

from erasediff_kernels.ops._checks import check_data
from erasediff_kernels.ops.gather_dot import check_code, check_weight
from erasediff_kernels.ops.scatter_outer import group_by_latent


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x_b = bias + sum_j values_bj weight[indices_bj]: z W_dec + b_dec for a z [N, n] with k entries in a row.

    2 N k d operations in place of 2 N n d. Differentiable in `values` (`gather_dot`), `weight` (`scatter_outer`) and
    `bias`; all of it with the same bits in each run.

    Args:
        values: [N, k], float32, bfloat16, float16 or float64.
        indices: int32 [N, k], each in 0 .. n - 1 (checked on the CPU only, a GPU would have to be waited for).
        weight: W_dec [n, d], the dtype of `values`.
        bias: b_dec [d], the dtype of `values`.

    Returns:
        [N, d], accumulated in fp32 (fp64 for float64) and rounded once.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match.
    """
    check_data("values", values)
    check_code("values", values, indices)
    check_weight(weight, values)
    if bias is not None:
        if bias.shape != weight.shape[1:]:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; it must be ({weight.shape[1]},), a row of the weight"
            )
        if bias.dtype != values.dtype or bias.device != values.device:
            raise ValueError(f"bias is {bias.dtype} on {bias.device}; it must be like values, {values.dtype}")
    decoded: Tensor = torch.ops.erasediff.sparse_decode(values, indices, weight, bias)
    return decoded


def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    values, indices, weight, _ = inputs
    ctx.save_for_backward(values, indices, weight)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
    values, indices, weight = ctx.saved_tensors
    needs_values, _, needs_weight, needs_bias = ctx.needs_input_grad
    grad_values = torch.ops.erasediff.gather_dot(grad, indices, weight) if needs_values else None
    grad_weight = None
    if needs_weight:
        order, starts = group_by_latent(indices, weight.shape[0])
        grad_weight = torch.ops.erasediff.scatter_outer(values, grad, order, starts)
    return grad_values, None, grad_weight, grad.sum(dim=0) if needs_bias else None


torch.library.register_autograd("erasediff::sparse_decode", backward, setup_context=setup_context)
