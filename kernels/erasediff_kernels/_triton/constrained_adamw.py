# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels of `constrained_adamw_`; `update.py` describes their layout."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from erasediff_kernels._triton.language import as_double, double_bits, load_block, mask_bits, narrow, store_block
from erasediff_kernels._triton.lists import column, find_row, plan
from erasediff_kernels._triton.moment_codes import (
    decode_signed,
    decode_unsigned,
    encode_signed,
    encode_unsigned,
    load_absmax,
    scale_blocks,
)
from erasediff_kernels._triton.update import BLOCK, WARPS, combine, compute_dtype, load_coefficients, write_param

SCALARS = 10


# The bits of a double have no divisibility to specialise on, and a schedule changes them at every step.
@triton.jit(do_not_specialize=["beta1_bits", "beta2_bits", "eps_bits", "weight_decay_bits", "ema_decay_bits"])
def adamw_scalars_kernel(
    out_ptr,
    finite_ptr,
    lr_ptr,
    step_ptr,
    beta1_bits,
    beta2_bits,
    eps_bits,
    weight_decay_bits,
    ema_decay_bits,
):
    step = tl.load(step_ptr) + tl.load(finite_ptr).to(tl.float32)
    tl.store(step_ptr, step)
    t = step.to(tl.float64)
    lr = tl.load(lr_ptr).to(tl.float64)
    beta1, beta2 = as_double(beta1_bits), as_double(beta2_bits)
    tl.store(out_ptr, beta1)
    tl.store(out_ptr + 1, 1.0 - beta1)
    tl.store(out_ptr + 2, beta2)
    tl.store(out_ptr + 3, 1.0 - beta2)
    tl.store(out_ptr + 4, as_double(eps_bits))
    tl.store(out_ptr + 5, 1.0 - lr * as_double(weight_decay_bits))
    tl.store(out_ptr + 6, lr / (1.0 - tl.exp(t * tl.log(beta1))))
    tl.store(out_ptr + 7, 1.0 / tl.sqrt(1.0 - tl.exp(t * tl.log(beta2))))
    tl.store(out_ptr + 8, 1.0 - as_double(ema_decay_bits))
    tl.store(out_ptr + 9, t)


@triton.jit
def adamw_block(
    p_ptr,
    m_ptr,
    v_ptr,
    m_absmax_ptr,
    v_absmax_ptr,
    r_ptr,
    g_ptr,
    ema_ptr,
    copy_ptr,
    mask_ptr,
    key_ptr,
    scalars,
    coefficients,
    place,
    start,
    end,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    beta1, weight1, beta2, weight2, eps, decay, step_size, root_scale, ema_rate, step = scalars
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < end
    old_p = load_block(p_ptr, offsets, inside, MASKED)
    old_m = load_block(m_ptr, offsets, inside, MASKED)
    old_v = load_block(v_ptr, offsets, inside, MASKED)
    CODED: tl.constexpr = m_absmax_ptr is not None
    if CODED:
        old_m = decode_signed(old_m, load_absmax(m_absmax_ptr, offsets, inside))
        old_v = decode_unsigned(old_v, load_absmax(v_absmax_ptr, offsets, inside))
    delta = combine(r_ptr, g_ptr, coefficients, offsets, inside, MASKED, COMPUTE)

    m = beta1 * old_m.to(COMPUTE) + weight1 * delta
    v = beta2 * old_v.to(COMPUTE) + weight2 * delta * delta
    p = old_p.to(COMPUTE) * decay - step_size * (m / (tl.sqrt(v) * root_scale + eps))

    if CODED:
        stored_m, stored_v = m, v
    else:
        stored_m = narrow(m, m_ptr.dtype.element_ty)
        stored_v = narrow(v, v_ptr.dtype.element_ty)
    kept = inside
    FROZEN: tl.constexpr = mask_ptr is not None
    if FROZEN:
        kept = mask_bits(mask_ptr, offsets, inside)
        stored_m = tl.where(kept, stored_m, old_m)
        stored_v = tl.where(kept, stored_v, old_v)
    if CODED:
        stored_m = encode_signed(stored_m, scale_blocks(stored_m, m_absmax_ptr, start, end, BLOCK))
        inverse = scale_blocks(stored_v, v_absmax_ptr, start, end, BLOCK)
        stored_v = encode_unsigned(stored_v, inverse, step, offsets)
    store_block(m_ptr, offsets, stored_m, inside, MASKED)
    store_block(v_ptr, offsets, stored_v, inside, MASKED)
    write_param(
        p_ptr, ema_ptr, copy_ptr, key_ptr, place, ema_rate, start, offsets, inside, kept, old_p, p,
        MASKED, FROZEN, COMPUTE, BLOCK,
    )  # fmt: skip


@triton.jit
def constrained_adamw_kernel(
    table_ptr,
    owners_ptr,
    scalars_ptr,
    multiplier_ptr,
    clip_scale_ptr,
    finite_ptr,
    key_ptr,
    P: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    M_ABSMAX: tl.constexpr,
    V_ABSMAX: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    EMA: tl.constexpr,
    COPY: tl.constexpr,
    MASK: tl.constexpr,
    BOTH: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(finite_ptr) == 0:
        return
    row_ptr, begin, end = find_row(table_ptr, owners_ptr, 10)
    place = tl.load(row_ptr + 2)
    p_ptr = column(row_ptr, 0, P, ALIGNED)
    m_ptr = column(row_ptr, 1, M, ALIGNED)
    v_ptr = column(row_ptr, 2, V, ALIGNED)
    m_absmax_ptr = column(row_ptr, 3, M_ABSMAX, ALIGNED) if M_ABSMAX is not None else None
    v_absmax_ptr = column(row_ptr, 4, V_ABSMAX, ALIGNED) if V_ABSMAX is not None else None
    r_ptr = column(row_ptr, 5, R, ALIGNED)
    g_ptr = column(row_ptr, 6, G, ALIGNED) if G is not None else None
    ema_ptr = column(row_ptr, 7, EMA, ALIGNED) if EMA is not None else None
    copy_ptr = column(row_ptr, 8, COPY, ALIGNED) if COPY is not None else None
    mask_ptr = column(row_ptr, 9, MASK, False) if MASK is not None else None
    coefficients = load_coefficients(multiplier_ptr, clip_scale_ptr, BOTH, COMPUTE)
    scalars = (
        tl.load(scalars_ptr).to(COMPUTE),
        tl.load(scalars_ptr + 1).to(COMPUTE),
        tl.load(scalars_ptr + 2).to(COMPUTE),
        tl.load(scalars_ptr + 3).to(COMPUTE),
        tl.load(scalars_ptr + 4).to(COMPUTE),
        tl.load(scalars_ptr + 5).to(COMPUTE),
        tl.load(scalars_ptr + 6).to(COMPUTE),
        tl.load(scalars_ptr + 7).to(COMPUTE),
        tl.load(scalars_ptr + 8).to(COMPUTE),
        tl.load(scalars_ptr + 9),
    )
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        adamw_block(
            p_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, r_ptr, g_ptr, ema_ptr, copy_ptr, mask_ptr, key_ptr,
            scalars, coefficients, place, start, end, False, COMPUTE, BLOCK,
        )  # fmt: skip
    if whole < end:
        adamw_block(
            p_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, r_ptr, g_ptr, ema_ptr, copy_ptr, mask_ptr, key_ptr,
            scalars, coefficients, place, whole, end, True, COMPUTE, BLOCK,
        )  # fmt: skip


def constrained_adamw_(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_absmaxes: list[Tensor],
    exp_avg_sq_absmaxes: list[Tensor],
    retain: list[Tensor],
    forget: list[Tensor],
    ema: list[Tensor],
    copies: list[Tensor],
    masks: list[Tensor],
    multiplier: Tensor,
    clip_scale: Tensor,
    finite: Tensor,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    rounding_key: Tensor | None,
) -> None:
    scalars = step.new_empty((SCALARS,), dtype=torch.float64)
    adamw_scalars_kernel[(1,)](
        scalars, finite, lr, step, *map(double_bits, (beta1, beta2, eps, weight_decay, ema_decay)), num_warps=1
    )
    moments = (exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes)
    for launch in plan((params, *moments, retain, forget, ema, copies, masks)):
        constrained_adamw_kernel[(launch.chunks,)](
            launch.table,
            launch.owners,
            scalars,
            multiplier,
            clip_scale,
            finite,
            rounding_key,
            *launch.dtypes,
            BOTH=multiplier.dim() == 1,
            COMPUTE=compute_dtype(launch.dtypes[0]),
            ALIGNED=launch.aligned,
            BLOCK=BLOCK,
            num_warps=WARPS,
            # Codes have the same bits everywhere.
            enable_fp_fusion=not exp_avg_absmaxes,
        )
