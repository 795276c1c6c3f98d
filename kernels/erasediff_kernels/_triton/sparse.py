# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels of `sparse_decode`, `gather_dot` and `scatter_outer`: rows are read where indices say."""

import triton
import triton.language as tl
from torch import Tensor

from erasediff_kernels._triton.language import LANES, narrow
from erasediff_kernels._triton.noise import contiguous

BLOCK = 512
THREADS = 64
WARPS = THREADS // LANES
# gather_dot: how many rows of the weight are read at a time, and how much of each.
ROWS, COLUMNS = 8, 256


@triton.jit
def sparse_decode_kernel(
    values_ptr, indices_ptr, weight_ptr, bias_ptr, out_ptr, N, k, blocks, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    if bias_ptr is None:
        decoded = tl.zeros((BLOCK,), COMPUTE)
    else:
        decoded = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(COMPUTE)
    for j in range(k):
        value = tl.load(values_ptr + row * k + j).to(COMPUTE)
        latent = tl.load(indices_ptr + row * k + j).to(tl.int64)
        decoded += value * tl.load(weight_ptr + latent * N + columns, mask=inside, other=0.0).to(COMPUTE)
    tl.store(out_ptr + row * N + columns, narrow(decoded, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gather_dot_kernel(
    rows_ptr,
    indices_ptr,
    weight_ptr,
    out_ptr,
    N,
    k,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, k, ROWS):
        entries = first + tl.arange(0, ROWS)
        present = entries < k
        latents = tl.load(indices_ptr + (row * k + entries), mask=present, other=0).to(tl.int64)
        products = tl.zeros((ROWS, COLUMNS), COMPUTE)
        for start in range(0, N, COLUMNS):
            columns = start + tl.arange(0, COLUMNS).to(tl.int64)
            inside = columns < N
            part = tl.load(rows_ptr + row * N + columns, mask=inside, other=0.0).to(COMPUTE)
            offsets = latents[:, None] * N + columns[None, :]
            weight = tl.load(weight_ptr + offsets, mask=present[:, None] & inside[None, :], other=0.0).to(COMPUTE)
            products += part[None, :] * weight
        dots = tl.sum(products, axis=1)
        tl.store(out_ptr + (row * k + entries), narrow(dots, out_ptr.dtype.element_ty), mask=present)


@triton.jit
def scatter_outer_kernel(
    values_ptr, rows_ptr, order_ptr, starts_ptr, out_ptr, N, k, blocks, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    latent = program // blocks
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    outer = tl.zeros((BLOCK,), COMPUTE)
    for entry in range(tl.load(starts_ptr + latent), tl.load(starts_ptr + latent + 1)):
        position = tl.load(order_ptr + entry)
        value = tl.load(values_ptr + position).to(COMPUTE)
        outer += value * tl.load(rows_ptr + position // k * N + columns, mask=inside, other=0.0).to(COMPUTE)
    tl.store(out_ptr + latent * N + columns, narrow(outer, out_ptr.dtype.element_ty), mask=inside)


def compute(tensor: Tensor):
    """The type that arithmetic is done in."""
    return tl.float64 if tensor.element_size() == 8 else tl.float32


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (count, k), dim = values.shape, weight.shape[1]
    out = values.new_empty((count, dim))
    blocks = triton.cdiv(dim, BLOCK)
    if out.numel():
        sparse_decode_kernel[(count * blocks,)](
            values.contiguous(),
            indices.contiguous(),
            weight.contiguous(),
            contiguous(bias),
            out,
            dim,
            k,
            blocks,
            COMPUTE=compute(values),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out


def gather_dot(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    (count, k), dim = indices.shape, weight.shape[1]
    out = rows.new_empty((count, k))
    if out.numel():
        gather_dot_kernel[(count,)](
            rows.contiguous(),
            indices.contiguous(),
            weight.contiguous(),
            out,
            dim,
            k,
            COMPUTE=compute(rows),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=2 * WARPS,
        )
    return out


def scatter_outer(values: Tensor, rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    latents, dim = starts.shape[0] - 1, rows.shape[1]
    out = rows.new_empty((latents, dim))
    blocks = triton.cdiv(dim, BLOCK)
    if out.numel():
        scatter_outer_kernel[(latents * blocks,)](
            values.contiguous(),
            rows.contiguous(),
            order.contiguous(),
            starts.contiguous(),
            out,
            dim,
            max(1, values.shape[1]),
            blocks,
            COMPUTE=compute(rows),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out
