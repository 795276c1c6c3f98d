"""The sparse code of a TopK autoencoder: the k largest activations of each row, and where they are."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from erasediff_kernels.ops._checks import check_data

LARGEST_K = 1024


class SparseCode(NamedTuple):
    """`values` [N, k] and the int32 `indices` [N, k] of the latents that hold them."""

    values: Tensor
    indices: Tensor


def topk_encode(preactivations: Tensor, k: int) -> SparseCode:
    """TopK_k(ReLU(preactivations)), the activation of a TopK sparse autoencoder (Gao et al. 2406.04093, eq. 3; SAeUron
    2501.18052, eq. 1), as a sparse code.

    Args:
        preactivations: [N, n], float32, bfloat16, float16 or float64, any strides. (Triton: not float64.)
        k: latents that stay active in a row, 1 .. min(n, 1024).

    Returns:
        Values in descending order, like `preactivations`, and int32 indices. Of equal values the one with the lower
        index comes first and is kept, so the code is the same in all implementations and runs; a row with fewer than k
        positive values is filled up with zeros. NaN counts as the largest value. Differentiable in `preactivations`:
        the gradient reaches the positive values that were kept.

    Raises:
        ValueError: for another shape or dtype, or a k out of range.
    """
    check_data("preactivations", preactivations)
    if preactivations.dim() != 2:
        raise ValueError(f"preactivations has shape {tuple(preactivations.shape)}; flatten it to rows, [N, n]")
    if not 1 <= k <= min(preactivations.shape[1], LARGEST_K):
        raise ValueError(f"k is {k}; it must lie in 1 .. {min(preactivations.shape[1], LARGEST_K)}")
    return SparseCode(*torch.ops.erasediff.topk_encode(preactivations, k))


def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(values, indices)
    ctx.latents = inputs[0].shape[1]


def backward(ctx: Any, grad_values: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    values, indices = ctx.saved_tensors
    active = grad_values * (values != 0)
    grad = active.new_zeros((values.shape[0], ctx.latents))
    return grad.scatter(1, indices.long(), active), None


torch.library.register_autograd("erasediff::topk_encode", backward, setup_context=setup_context)
