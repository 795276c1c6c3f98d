# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels of `constrained_sgd_`; `update.py` describes their layout."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from erasediff_kernels._triton.language import as_double, double_bits, load_block, mask_bits, narrow, store_block
from erasediff_kernels._triton.lists import column, find_row, plan
from erasediff_kernels._triton.update import BLOCK, WARPS, combine, compute_dtype, load_coefficients, write_param

SCALARS = 4


@triton.jit(do_not_specialize=["momentum_bits", "weight_decay_bits", "ema_decay_bits"])
def sgd_scalars_kernel(out_ptr, finite_ptr, lr_ptr, step_ptr, momentum_bits, weight_decay_bits, ema_decay_bits):
    tl.store(step_ptr, tl.load(step_ptr) + tl.load(finite_ptr).to(tl.float32))
    lr = tl.load(lr_ptr).to(tl.float64)
    tl.store(out_ptr, as_double(momentum_bits))
    tl.store(out_ptr + 1, lr)
    tl.store(out_ptr + 2, 1.0 - lr * as_double(weight_decay_bits))
    tl.store(out_ptr + 3, 1.0 - as_double(ema_decay_bits))


@triton.jit
def sgd_block(
    p_ptr,
    buffer_ptr,
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
    NESTEROV: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    momentum, lr, decay, ema_rate = scalars
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < end
    old_p = load_block(p_ptr, offsets, inside, MASKED)
    delta = combine(r_ptr, g_ptr, coefficients, offsets, inside, MASKED, COMPUTE)
    kept = inside
    FROZEN: tl.constexpr = mask_ptr is not None
    if FROZEN:
        kept = mask_bits(mask_ptr, offsets, inside)

    direction = delta
    if buffer_ptr is not None:
        old_buffer = load_block(buffer_ptr, offsets, inside, MASKED)
        buffer = momentum * old_buffer.to(COMPUTE) + delta
        direction = delta + momentum * buffer if NESTEROV else buffer
        stored_buffer = narrow(buffer, buffer_ptr.dtype.element_ty)
        if FROZEN:
            stored_buffer = tl.where(kept, stored_buffer, old_buffer)
        store_block(buffer_ptr, offsets, stored_buffer, inside, MASKED)

    p = old_p.to(COMPUTE) * decay - lr * direction
    write_param(
        p_ptr, ema_ptr, copy_ptr, key_ptr, place, ema_rate, start, offsets, inside, kept, old_p, p,
        MASKED, FROZEN, COMPUTE, BLOCK,
    )  # fmt: skip


@triton.jit
def constrained_sgd_kernel(
    table_ptr,
    owners_ptr,
    scalars_ptr,
    multiplier_ptr,
    clip_scale_ptr,
    finite_ptr,
    key_ptr,
    P: tl.constexpr,
    BUFFER: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    EMA: tl.constexpr,
    COPY: tl.constexpr,
    MASK: tl.constexpr,
    NESTEROV: tl.constexpr,
    BOTH: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(finite_ptr) == 0:
        return
    row_ptr, begin, end = find_row(table_ptr, owners_ptr, 7)
    place = tl.load(row_ptr + 2)
    p_ptr = column(row_ptr, 0, P, ALIGNED)
    buffer_ptr = column(row_ptr, 1, BUFFER, ALIGNED) if BUFFER is not None else None
    r_ptr = column(row_ptr, 2, R, ALIGNED)
    g_ptr = column(row_ptr, 3, G, ALIGNED) if G is not None else None
    ema_ptr = column(row_ptr, 4, EMA, ALIGNED) if EMA is not None else None
    copy_ptr = column(row_ptr, 5, COPY, ALIGNED) if COPY is not None else None
    mask_ptr = column(row_ptr, 6, MASK, False) if MASK is not None else None
    coefficients = load_coefficients(multiplier_ptr, clip_scale_ptr, BOTH, COMPUTE)
    scalars = (
        tl.load(scalars_ptr).to(COMPUTE),
        tl.load(scalars_ptr + 1).to(COMPUTE),
        tl.load(scalars_ptr + 2).to(COMPUTE),
        tl.load(scalars_ptr + 3).to(COMPUTE),
    )
    whole = begin + (end - begin) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        sgd_block(
            p_ptr, buffer_ptr, r_ptr, g_ptr, ema_ptr, copy_ptr, mask_ptr, key_ptr, scalars,
            coefficients, place, start, end, NESTEROV, False, COMPUTE, BLOCK,
        )  # fmt: skip
    if whole < end:
        sgd_block(
            p_ptr, buffer_ptr, r_ptr, g_ptr, ema_ptr, copy_ptr, mask_ptr, key_ptr, scalars,
            coefficients, place, whole, end, NESTEROV, True, COMPUTE, BLOCK,
        )  # fmt: skip


def constrained_sgd_(
    params: list[Tensor],
    momentum_buffers: list[Tensor],
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
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    ema_decay: float,
    rounding_key: Tensor | None,
) -> None:
    scalars = step.new_empty((SCALARS,), dtype=torch.float64)
    sgd_scalars_kernel[(1,)](
        scalars, finite, lr, step, *map(double_bits, (momentum, weight_decay, ema_decay)), num_warps=1
    )
    for launch in plan((params, momentum_buffers, retain, forget, ema, copies, masks)):
        constrained_sgd_kernel[(launch.chunks,)](
            launch.table,
            launch.owners,
            scalars,
            multiplier,
            clip_scale,
            finite,
            rounding_key,
            *launch.dtypes,
            NESTEROV=nesterov,
            BOTH=multiplier.dim() == 1,
            COMPUTE=compute_dtype(launch.dtypes[0]),
            ALIGNED=launch.aligned,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
