# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels of `philox_bits`, `philox_noise` and `add_noise`: one program per block of one sample."""

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from erasediff_kernels._triton.language import LANES, draw_noise, draw_words, in_element_order, narrow

# 8 elements per thread: 16 bytes of a half type, two times 16 of fp32, and no register pressure from Philox.
BLOCK = 1024
THREADS = 128
WARPS = THREADS // LANES


@triton.jit
def locate(blocks, BLOCK: tl.constexpr):
    """(sample, first element) of this program, both int64."""
    program = tl.program_id(0).to(tl.int64)
    return program // blocks, program % blocks * BLOCK


@triton.jit
def philox_bits_kernel(ids_ptr, key_ptr, out_ptr, N, blocks, role, BLOCK: tl.constexpr):
    sample, first = locate(blocks, BLOCK)
    w0, w1, w2, w3 = draw_words(first, tl.load(ids_ptr + sample), key_ptr, role, BLOCK)
    elements = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + sample * N + elements, in_element_order(w0, w1, w2, w3).to(tl.int64), mask=elements < N)


@triton.jit
def philox_noise_kernel(ids_ptr, key_ptr, out_ptr, N, blocks, role, DISTRIBUTION: tl.constexpr, BLOCK: tl.constexpr):
    sample, first = locate(blocks, BLOCK)
    noise = draw_noise(first, tl.load(ids_ptr + sample), key_ptr, role, DISTRIBUTION, BLOCK)
    elements = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + sample * N + elements, narrow(noise, out_ptr.dtype.element_ty), mask=elements < N)


@triton.jit
def add_noise_kernel(
    sample_ptr, alpha_ptr, sigma_ptr, noise_ptr, ids_ptr, key_ptr, out_ptr, N, blocks, role, BLOCK: tl.constexpr
):
    sample, first = locate(blocks, BLOCK)
    elements = first + tl.arange(0, BLOCK)
    inside = elements < N
    alpha, sigma = tl.load(alpha_ptr + sample), tl.load(sigma_ptr + sample)
    # alpha is fp32, or fp64 for fp64 data: it sets the type of the arithmetic.
    x = tl.load(sample_ptr + sample * N + elements, mask=inside, other=0.0).to(alpha.dtype)
    if noise_ptr is None:
        noise = draw_noise(first, tl.load(ids_ptr + sample), key_ptr, role, "normal", BLOCK).to(alpha.dtype)
    else:
        noise = tl.load(noise_ptr + sample * N + elements, mask=inside, other=0.0).to(alpha.dtype)
    noised = alpha * x + sigma * noise
    tl.store(out_ptr + sample * N + elements, narrow(noised, out_ptr.dtype.element_ty), mask=inside)


def blocks_per_sample(numel: int) -> int:
    return -(-numel // BLOCK)


def philox_bits(sample_ids: Tensor, key: Tensor, role: int, words: int) -> Tensor:
    batch, blocks = sample_ids.shape[0], blocks_per_sample(words)
    out = sample_ids.new_empty((batch, words))
    if out.numel():
        philox_bits_kernel[(batch * blocks,)](
            sample_ids.contiguous(), key.contiguous(), out, words, blocks, role, BLOCK=BLOCK, num_warps=WARPS
        )
    return out


def philox_noise(
    sample_ids: Tensor, key: Tensor, role: int, shape: Sequence[int], distribution: str, dtype: torch.dtype
) -> Tensor:
    batch, numel = sample_ids.shape[0], prod(shape)
    blocks = blocks_per_sample(numel)
    out = sample_ids.new_empty((batch, *shape), dtype=dtype)
    if out.numel():
        philox_noise_kernel[(batch * blocks,)](
            sample_ids.contiguous(),
            key.contiguous(),
            out,
            numel,
            blocks,
            role,
            DISTRIBUTION=distribution,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return out


def add_noise(
    sample: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    sample_ids: Tensor | None,
    key: Tensor | None,
    role: int,
) -> Tensor:
    batch, numel = sample.shape[0], prod(sample.shape[1:])
    blocks = blocks_per_sample(numel)
    out = sample.new_empty(sample.shape)
    if out.numel():
        add_noise_kernel[(batch * blocks,)](
            sample.contiguous(),
            alpha.contiguous(),
            sigma.contiguous(),
            contiguous(noise),
            contiguous(sample_ids),
            contiguous(key),
            out,
            numel,
            blocks,
            role,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return out


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
