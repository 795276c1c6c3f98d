# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The second stage of every reduction: one program per sum, in an order that does not depend on scheduling."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from erasediff_kernels._triton.language import LANES

BLOCK = 4096
THREADS = 512
WARPS = THREADS // LANES


@triton.jit
def sum_partials_kernel(partials_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + (row * n + offsets), mask=offsets < n, other=0.0)
    tl.store(out_ptr + row, tl.sum(total).to(out_ptr.dtype.element_ty))


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 [rows, n], contiguous, summed over n: `dtype` [rows]."""
    rows, n = partials.shape
    out = partials.new_empty((rows,), dtype=dtype)
    sum_partials_kernel[(rows,)](partials, out, n, BLOCK=BLOCK, num_warps=WARPS)
    return out
