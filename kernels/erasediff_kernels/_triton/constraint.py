# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels of `gradient_gram`, `constraint_multiplier` and `clip_combination`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from erasediff_kernels._storage import has_layout_of
from erasediff_kernels._triton.language import LANES, as_double, double_bits, load_block, mask_bits
from erasediff_kernels._triton.lists import column, find_row, plan
from erasediff_kernels._triton.reduction import sum_partials

# Three fp64 accumulators of 8 elements per thread are 48 registers: room for eight programs on a multiprocessor.
BLOCK = 1024
THREADS = 128
WARPS = THREADS // LANES


@triton.jit
def add_products(r_ptr, g_ptr, mask_ptr, start, end, rr, rf, ff, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < end
    r = load_block(r_ptr, offsets, inside, MASKED).to(tl.float64)
    if mask_ptr is not None:
        kept = mask_bits(mask_ptr, offsets, inside)
        r = tl.where(kept, r, 0.0)
    rr += r * r
    if g_ptr is not None:
        g = load_block(g_ptr, offsets, inside, MASKED).to(tl.float64)
        if mask_ptr is not None:
            g = tl.where(kept, g, 0.0)
        rf += r * g
        ff += g * g
    return rr, rf, ff


@triton.jit
def gradient_gram_kernel(
    table_ptr,
    owners_ptr,
    partials_ptr,
    total,
    first,
    R: tl.constexpr,
    G: tl.constexpr,
    MASK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, begin, end = find_row(table_ptr, owners_ptr, 3)
    r_ptr = column(row_ptr, 0, R, ALIGNED)
    g_ptr = column(row_ptr, 1, G, ALIGNED) if G is not None else None
    mask_ptr = column(row_ptr, 2, MASK, False) if MASK is not None else None
    rr = tl.zeros((BLOCK,), tl.float64)
    rf = tl.zeros((BLOCK,), tl.float64)
    ff = tl.zeros((BLOCK,), tl.float64)
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        rr, rf, ff = add_products(r_ptr, g_ptr, mask_ptr, start, end, rr, rf, ff, False, BLOCK)
    if whole < end:
        rr, rf, ff = add_products(r_ptr, g_ptr, mask_ptr, whole, end, rr, rf, ff, True, BLOCK)
    out_ptr = partials_ptr + first + tl.program_id(0)
    tl.store(out_ptr, tl.sum(rr))
    tl.store(out_ptr + total, tl.sum(rf))
    tl.store(out_ptr + 2 * total, tl.sum(ff))


def gradient_gram(retain: list[Tensor], forget: list[Tensor], masks: list[Tensor]) -> Tensor:
    if forget and not all(map(has_layout_of, forget, retain)):
        retain, forget = [r.contiguous() for r in retain], [g.contiguous() for g in forget]
    launches = plan((retain, forget, masks))
    total = sum(launch.chunks for launch in launches)
    partials = retain[0].new_empty((3, total), dtype=torch.float64)
    first = 0
    for launch in launches:
        r, g, mask = launch.dtypes
        gradient_gram_kernel[(launch.chunks,)](
            launch.table,
            launch.owners,
            partials,
            total,
            first,
            R=r,
            G=g,
            MASK=mask,
            ALIGNED=launch.aligned,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        first += launch.chunks
    return sum_partials(partials, torch.float64)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def clip(rr, rf, ff, a, b, max_norm, CLIP: tl.constexpr):
    """(clip scale, norm, whether all is finite) of a r + b g, for coefficients as fp32 holds them."""
    norm = tl.sqrt(tl.maximum(a * a * rr + 2.0 * a * b * rf + b * b * ff, 0.0))
    # tl.maximum drops a NaN, so the coefficients are checked as well.
    finite = is_finite(rr) & is_finite(rf) & is_finite(ff) & is_finite(norm) & is_finite(a) & is_finite(b)
    clip_scale = tl.full((), 1.0, tl.float64)
    if CLIP:
        clip_scale = tl.minimum(max_norm / (norm + 1e-6), 1.0)
    return clip_scale, norm, finite


# The bits of a double have no divisibility to specialise on, and a schedule changes them at every step.
@triton.jit(do_not_specialize=["eta_bits", "max_norm_bits"])
def constraint_multiplier_kernel(
    gram_ptr,
    gap_ptr,
    multiplier_ptr,
    clip_scale_ptr,
    norm_ptr,
    finite_ptr,
    eta_bits,
    max_norm_bits,
    BARRIER: tl.constexpr,
    CLIP: tl.constexpr,
):
    rr, rf, ff = tl.load(gram_ptr), tl.load(gram_ptr + 1), tl.load(gram_ptr + 2)
    eta = as_double(eta_bits)
    divisor = tl.where(ff == 0.0, 1.0, ff)
    if BARRIER == "fixed":
        multiplier = eta
    else:
        if BARRIER == "norm":
            multiplier = eta - rf / divisor
        elif BARRIER == "gap":
            gap = tl.load(gap_ptr).to(tl.float64)
            multiplier = (eta * tl.maximum(gap, 0.0) - rf) / divisor
        else:
            tl.static_assert(BARRIER == "cosine")
            product = rr * ff
            multiplier = eta - rf / tl.sqrt(tl.where(product == 0.0, 1.0, product))
        multiplier = tl.where(ff == 0.0, 0.0, tl.maximum(multiplier, 0.0))
    # The norm of the combination that will be applied, hence with the multiplier as fp32 holds it.
    rounded = multiplier.to(tl.float32)
    one = tl.full((), 1.0, tl.float64)
    clip_scale, norm, finite = clip(rr, rf, ff, one, rounded.to(tl.float64), as_double(max_norm_bits), CLIP)
    if BARRIER == "gap":
        finite = finite & is_finite(gap)
    tl.store(multiplier_ptr, rounded)
    tl.store(clip_scale_ptr, clip_scale.to(tl.float32))
    tl.store(norm_ptr, norm.to(tl.float32))
    tl.store(finite_ptr, finite)


def constraint_multiplier(
    gram: Tensor, barrier: str, eta: float, gap: Tensor | None, max_norm: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    multiplier, clip_scale, norm = (gram.new_empty((), dtype=torch.float32) for _ in range(3))
    finite = gram.new_empty((), dtype=torch.bool)
    constraint_multiplier_kernel[(1,)](
        gram.contiguous(),
        gap,
        multiplier,
        clip_scale,
        norm,
        finite,
        double_bits(eta),
        double_bits(1.0 if max_norm is None else max_norm),
        BARRIER=barrier,
        CLIP=max_norm is not None,
        num_warps=1,
    )
    return multiplier, clip_scale, norm, finite


@triton.jit(do_not_specialize=["max_norm_bits"])
def clip_combination_kernel(
    gram_ptr,
    coefficients_ptr,
    multiplier_ptr,
    clip_scale_ptr,
    norm_ptr,
    finite_ptr,
    max_norm_bits,
    CLIP: tl.constexpr,
):
    rr, rf, ff = tl.load(gram_ptr), tl.load(gram_ptr + 1), tl.load(gram_ptr + 2)
    a, b = tl.load(coefficients_ptr).to(tl.float32), tl.load(coefficients_ptr + 1).to(tl.float32)
    max_norm = as_double(max_norm_bits)
    clip_scale, norm, finite = clip(rr, rf, ff, a.to(tl.float64), b.to(tl.float64), max_norm, CLIP)
    tl.store(multiplier_ptr, a)
    tl.store(multiplier_ptr + 1, b)
    tl.store(clip_scale_ptr, clip_scale.to(tl.float32))
    tl.store(norm_ptr, norm.to(tl.float32))
    tl.store(finite_ptr, finite)


def clip_combination(
    gram: Tensor, coefficients: Tensor, max_norm: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    multiplier = gram.new_empty((2,), dtype=torch.float32)
    clip_scale, norm = (gram.new_empty((), dtype=torch.float32) for _ in range(2))
    finite = gram.new_empty((), dtype=torch.bool)
    clip_combination_kernel[(1,)](
        gram.contiguous(),
        coefficients.contiguous(),
        multiplier,
        clip_scale,
        norm,
        finite,
        double_bits(1.0 if max_norm is None else max_norm),
        CLIP=max_norm is not None,
        num_warps=1,
    )
    return multiplier, clip_scale, norm, finite
