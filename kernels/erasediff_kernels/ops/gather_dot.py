"""Products of each row with the few rows of a matrix that its indices name."""

import torch
from torch import Tensor

from erasediff_kernels.ops._checks import check_data


def gather_dot(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """dots_bj = <rows_b, weight[indices_bj]>: the gradient of `sparse_decode` with respect to its values.

    Args:
        rows: [N, d], float32, bfloat16, float16 or float64.
        indices: int32 [N, k], each in 0 .. n - 1.
        weight: [n, d], the dtype of `rows`.

    Returns:
        [N, k] in the dtype of `rows`, accumulated in fp32 (fp64 for float64).

    Raises:
        ValueError: for shapes, dtypes or devices that do not match.
    """
    check_data("rows", rows)
    if rows.dim() != 2 or indices.dim() != 2 or rows.shape[0] != indices.shape[0]:
        raise ValueError(f"rows {tuple(rows.shape)} and indices {tuple(indices.shape)}; give [N, d] and [N, k]")
    check_indices(indices, rows)
    check_weight(weight, rows)
    if weight.shape[1] != rows.shape[1]:
        raise ValueError(f"rows have {rows.shape[1]} elements, those of the weight {weight.shape[1]}; make them equal")
    dots: Tensor = torch.ops.erasediff.gather_dot(rows, indices, weight)
    return dots


def check_indices(indices: Tensor, like: Tensor) -> None:
    if indices.dtype != torch.int32:
        raise ValueError(f"indices is {indices.dtype}; convert it to int32, as topk_encode returns it")
    if indices.device != like.device:
        raise ValueError(f"indices is on {indices.device}, the values on {like.device}; move one to the other")


def check_code(name: str, values: Tensor, indices: Tensor) -> None:
    """A sparse code: values and int32 indices, both [N, k]."""
    if values.dim() != 2 or values.shape != indices.shape:
        raise ValueError(f"{name} {tuple(values.shape)} and indices {tuple(indices.shape)}; both must be [N, k]")
    check_indices(indices, values)


def check_weight(weight: Tensor, like: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [n, d], one row per latent")
    if weight.dtype != like.dtype or weight.device != like.device:
        raise ValueError(
            f"weight is {weight.dtype} on {weight.device}; convert it to {like.dtype} on {like.device} as the other"
        )
