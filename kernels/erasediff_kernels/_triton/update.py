# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton device functions that `constrained_adamw_` and `constrained_sgd_` share: combination and writing.

A program of one warp first advances the step and works out, in fp64, the scalars that all others share (`*_scalars`).
The update then reads each element of p, its moments, r and g once, and writes p and its moments once.
"""

import triton
import triton.language as tl

from erasediff_kernels._triton.language import (
    LANES,
    ROUNDING_ROLE,
    draw_words,
    in_element_order,
    load_block,
    narrow,
    stochastic_round,
    store_block,
)

# Five streams in, three out: 8 elements per thread keep 160 bytes per thread in flight within 64 registers of data.
BLOCK = 1024
THREADS = 128
WARPS = THREADS // LANES


@triton.jit
def load_coefficients(multiplier_ptr, clip_scale_ptr, BOTH: tl.constexpr, COMPUTE: tl.constexpr):
    """(coefficient of r or None for 1, multiplier of g, clip scale); BOTH: the pointer is to two numbers."""
    clip_scale = tl.load(clip_scale_ptr).to(COMPUTE)
    if BOTH:
        return tl.load(multiplier_ptr).to(COMPUTE), tl.load(multiplier_ptr + 1).to(COMPUTE), clip_scale
    else:
        return None, tl.load(multiplier_ptr).to(COMPUTE), clip_scale


@triton.jit
def combine(r_ptr, g_ptr, coefficients, offsets, inside, MASKED: tl.constexpr, COMPUTE: tl.constexpr):
    """delta = clip_scale (coefficient r + multiplier g)."""
    coefficient, multiplier, clip_scale = coefficients
    delta = load_block(r_ptr, offsets, inside, MASKED).to(COMPUTE)
    # Not a product with 1, which could change what the compiler fuses.
    if coefficient is not None:
        delta *= coefficient
    if g_ptr is not None:
        delta += multiplier * load_block(g_ptr, offsets, inside, MASKED).to(COMPUTE)
    return delta * clip_scale


@triton.jit
def write_param(
    p_ptr,
    ema_ptr,
    copy_ptr,
    key_ptr,
    place,
    ema_rate,
    start,
    offsets,
    inside,
    kept,
    old,
    new,
    MASKED: tl.constexpr,
    FROZEN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round and store the parameter, then whatever follows it: EMA and copy see it as it is stored."""
    P: tl.constexpr = p_ptr.dtype.element_ty
    if key_ptr is not None and (tl.bfloat16 == P or tl.float16 == P):
        w0, w1, w2, w3 = draw_words(start, place, key_ptr, ROUNDING_ROLE, BLOCK)
        stored = stochastic_round(new, in_element_order(w0, w1, w2, w3), P)
    else:
        stored = narrow(new, P)
    if FROZEN:
        stored = tl.where(kept, stored, old)
    store_block(p_ptr, offsets, stored, inside, MASKED)
    seen = stored.to(COMPUTE)
    if ema_ptr is not None:
        ema = load_block(ema_ptr, offsets, inside, MASKED).to(COMPUTE)
        ema += ema_rate * (seen - ema)
        store_block(ema_ptr, offsets, narrow(ema, ema_ptr.dtype.element_ty), inside, MASKED)
    if copy_ptr is not None:
        store_block(copy_ptr, offsets, narrow(seen, copy_ptr.dtype.element_ty), inside, MASKED)


def compute_dtype(param_dtype: object) -> object:
    return tl.float64 if param_dtype == tl.float64 else tl.float32
