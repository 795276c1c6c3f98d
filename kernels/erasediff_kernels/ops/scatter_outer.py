"""The sum of outer products that a sparse code selects, latent by latent."""

import torch
from torch import Tensor

from erasediff_kernels.ops._checks import check_data
from erasediff_kernels.ops.gather_dot import check_code


def group_by_latent(indices: Tensor, latents: int) -> tuple[Tensor, Tensor]:
    """Entries of a sparse code sorted by latent: int64 order [N k] of flat positions (in ascending order within a
    latent) and int64 starts [latents + 1]; those of latent i are order[starts[i]:starts[i + 1]]."""
    latent, order = indices.reshape(-1).sort(stable=True)
    bounds = torch.arange(latents + 1, dtype=latent.dtype, device=latent.device)
    return order, torch.searchsorted(latent, bounds)


def scatter_outer(values: Tensor, indices: Tensor, rows: Tensor, latents: int) -> Tensor:
    """outer_i = sum of values_bj rows_b over all (b, j) with indices_bj = i: z^T rows for a sparse code z [N, n].

    The gradient of `sparse_decode` with respect to its weight, and of an encoder with respect to W_enc. The entries are
    sorted by latent first, and each latent is added up in one place and in order: no atomics, the same bits each run.

    Args:
        values: [N, k], float32, bfloat16, float16 or float64.
        indices: int32 [N, k], each in 0 .. latents - 1.
        rows: [N, d], the dtype of `values`.
        latents: n.

    Returns:
        [latents, d] in the dtype of `rows`, accumulated in fp32 (fp64 for float64); zeros for latents without entries.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match.
    """
    check_data("values", values)
    check_code("values", values, indices)
    if rows.dim() != 2 or rows.shape[0] != values.shape[0]:
        raise ValueError(f"rows has shape {tuple(rows.shape)}; give one row for each of the {values.shape[0]} codes")
    if rows.dtype != values.dtype or rows.device != values.device:
        raise ValueError(f"rows is {rows.dtype} on {rows.device}; it must be like values, {values.dtype}")
    if latents < 1:
        raise ValueError(f"latents is {latents}; it must be at least 1")
    outer: Tensor = torch.ops.erasediff.scatter_outer(values, rows, *group_by_latent(indices, latents))
    return outer
