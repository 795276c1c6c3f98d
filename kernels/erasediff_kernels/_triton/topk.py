# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernel of `topk_encode`: a program goes through a row and keeps its largest keys sorted.

A key is an int64: the bits of the activation above, the inverted index below. Activations are not negative, so their
bits sort as they do; no two keys are equal, so there is one order, with the lower index first among equals.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from erasediff_kernels._triton.language import LANES, narrow

BLOCK = 1024
THREADS = 128
WARPS = THREADS // LANES
LARGEST_INDEX = tl.constexpr(2**31 - 1)
NAN_BITS = tl.constexpr(0x7FC00000)


@triton.jit
def block_keys(preactivations_ptr, row, columns, N):
    inside = columns < N
    x = tl.load(preactivations_ptr + row * N + columns, mask=inside, other=0.0).to(tl.float32)
    bits = tl.where(x > 0.0, x, 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(x == x, bits, NAN_BITS)
    keys = (bits.to(tl.int64) << 32) | (~columns & LARGEST_INDEX)
    # What lies beyond the row is below everything in it.
    return tl.where(inside, keys, -1)


@triton.jit
def topk_encode_kernel(preactivations_ptr, values_ptr, indices_ptr, N, k, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    kept = tl.topk(block_keys(preactivations_ptr, row, tl.arange(0, BLOCK).to(tl.int64), N), KEPT)
    for start in range(BLOCK, N, BLOCK):
        found = tl.topk(block_keys(preactivations_ptr, row, start + tl.arange(0, BLOCK).to(tl.int64), N), KEPT)
        # Of two lists in descending order, one reversed, the larger of each pair are the largest of both.
        kept = tl.sort(tl.maximum(kept, tl.flip(found, 0)), descending=True)
    columns = tl.arange(0, KEPT)
    inside = columns < k
    value = (kept >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    index = (~kept & LARGEST_INDEX).to(tl.int32)
    tl.store(values_ptr + (row * k + columns), narrow(value, values_ptr.dtype.element_ty), mask=inside)
    tl.store(indices_ptr + (row * k + columns), index, mask=inside)


def topk_encode(preactivations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if preactivations.dtype == torch.float64:
        raise NotImplementedError("topk_encode in Triton sorts 32 bits; convert float64 to float32, or use `reference`")
    count, latents = preactivations.shape
    values = preactivations.new_empty((count, k))
    indices = preactivations.new_empty((count, k), dtype=torch.int32)
    if values.numel():
        topk_encode_kernel[(count,)](
            preactivations.contiguous(),
            values,
            indices,
            latents,
            k,
            KEPT=triton.next_power_of_2(max(2, k)),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return values, indices
