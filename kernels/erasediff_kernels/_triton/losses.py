# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels of `denoising_loss` and `deviation_loss`: one pass writes the gradient and a partial sum per program,
and a second, single program adds the partial sums in a fixed order."""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from erasediff_kernels._triton.language import draw_noise, narrow
from erasediff_kernels._triton.noise import BLOCK, WARPS, blocks_per_sample, contiguous, locate
from erasediff_kernels._triton.reduction import sum_partials


@triton.jit
def squared_error_kernel(
    prediction_ptr,
    sample_ptr,
    alpha_ptr,
    sigma_ptr,
    weight_ptr,
    noise_ptr,
    ids_ptr,
    key_ptr,
    grad_ptr,
    partials_ptr,
    N,
    blocks,
    role,
    PREDICTION_TYPE: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Against the target of `PREDICTION_TYPE`; a deviation loss is "epsilon" with noise of its own."""
    sample, first = locate(blocks, BLOCK)
    elements = first + tl.arange(0, BLOCK)
    inside = elements < N
    base = sample * N
    # The weight is fp32, or fp64 for fp64 data: it sets the type of the arithmetic.
    weight = tl.load(weight_ptr + sample)
    prediction = tl.load(prediction_ptr + base + elements, mask=inside, other=0.0).to(weight.dtype)

    if PREDICTION_TYPE != "sample":
        if noise_ptr is None:
            noise = draw_noise(first, tl.load(ids_ptr + sample), key_ptr, role, DISTRIBUTION, BLOCK).to(weight.dtype)
        else:
            noise = tl.load(noise_ptr + base + elements, mask=inside, other=0.0).to(weight.dtype)
    if PREDICTION_TYPE != "epsilon":
        x = tl.load(sample_ptr + base + elements, mask=inside, other=0.0).to(weight.dtype)

    if PREDICTION_TYPE == "epsilon":
        target = noise
    elif PREDICTION_TYPE == "v_prediction":
        target = tl.load(alpha_ptr + sample) * noise - tl.load(sigma_ptr + sample) * x
    elif PREDICTION_TYPE == "sample":
        target = x
    else:
        tl.static_assert(PREDICTION_TYPE == "flow_prediction")
        target = noise - x

    error = tl.where(inside, prediction - target, 0.0)
    grad = error * (2.0 * weight / N)
    tl.store(grad_ptr + base + elements, narrow(grad, grad_ptr.dtype.element_ty), mask=inside)
    wide = error.to(tl.float64)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(wide * wide) * (weight.to(tl.float64) / N))


def squared_error(
    prediction: Tensor,
    sample: Tensor | None,
    alpha: Tensor | None,
    sigma: Tensor | None,
    weight: Tensor,
    noise: Tensor | None,
    sample_ids: Tensor | None,
    key: Tensor | None,
    role: int,
    prediction_type: str,
    distribution: str,
) -> tuple[Tensor, Tensor]:
    batch, numel = prediction.shape[0], prod(prediction.shape[1:])
    programs = batch * blocks_per_sample(numel)
    grad = prediction.new_empty(prediction.shape)
    partials = prediction.new_empty((programs,), dtype=torch.float64)
    if programs:
        squared_error_kernel[(programs,)](
            prediction.contiguous(),
            contiguous(sample),
            contiguous(alpha),
            contiguous(sigma),
            weight.contiguous(),
            contiguous(noise),
            contiguous(sample_ids),
            contiguous(key),
            grad,
            partials,
            numel,
            blocks_per_sample(numel),
            role,
            PREDICTION_TYPE=prediction_type,
            DISTRIBUTION=distribution,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return sum_partials(partials[None], weight.dtype).squeeze(0), grad


def denoising_loss(
    prediction: Tensor,
    sample: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    sample_ids: Tensor | None,
    key: Tensor | None,
    role: int,
    prediction_type: str,
) -> tuple[Tensor, Tensor]:
    return squared_error(
        prediction, sample, alpha, sigma, weight, noise, sample_ids, key, role, prediction_type, "normal"
    )


def deviation_loss(
    prediction: Tensor,
    weight: Tensor,
    target: Tensor | None,
    sample_ids: Tensor | None,
    key: Tensor | None,
    role: int,
    distribution: str,
) -> tuple[Tensor, Tensor]:
    return squared_error(prediction, None, None, None, weight, target, sample_ids, key, role, "epsilon", distribution)
