"""x_t = alpha x_0 + sigma epsilon, with epsilon drawn on the way."""

from typing import Any

import torch
from torch import Tensor

from erasediff_kernels.ops._checks import check_data, check_given_or_drawn, per_sample
from erasediff_kernels.reference.noise import rows


def add_noise(
    sample: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    sample_ids: Tensor | None = None,
    key: Tensor | None = None,
    role: int = 0,
) -> Tensor:
    """The forward process, alpha_b sample_b + sigma_b noise_b, computed in fp32 (fp64 for fp64) and rounded once.

    Args:
        sample: [B, ...], float32, bfloat16, float16 or float64, any strides.
        alpha, sigma: [B], floating.
        noise: like `sample`; or leave it out and give the address of normal noise:
        sample_ids, key, role: as in `philox_bits`. The noise equals `philox_noise(sample_ids, key, role, ...)` in fp32.

    Returns:
        Contiguous tensor like `sample`, differentiable in sample, alpha, sigma and noise.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match, or with both or neither of noise and address.
    """
    check_data("sample", sample)
    check_given_or_drawn("noise", noise, sample_ids, key, role, sample)
    alpha, sigma = per_sample("alpha", alpha, sample), per_sample("sigma", sigma, sample)
    result: Tensor = torch.ops.erasediff.add_noise(sample, alpha, sigma, noise, sample_ids, key, role)
    return result


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sample, alpha, sigma, noise, sample_ids, key, role = inputs
    ctx.save_for_backward(sample, alpha, sigma, noise, sample_ids, key)
    ctx.role = role


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sample, alpha, sigma, noise, sample_ids, key = ctx.saved_tensors
    needs_sample, needs_alpha, needs_sigma, needs_noise = ctx.needs_input_grad[:4]
    column = (-1, *(1,) * (sample.dim() - 1))
    wide = grad.to(alpha.dtype)
    grad_sample = grad_alpha = grad_sigma = grad_noise = None
    if needs_sample:
        grad_sample = (alpha.view(column) * wide).to(sample.dtype)
    if needs_noise:
        grad_noise = (sigma.view(column) * wide).to(sample.dtype)
    if needs_alpha:
        grad_alpha = rows(wide * sample).sum(dim=1)
    if needs_sigma:
        if noise is None:
            noise = torch.ops.erasediff.philox_noise(sample_ids, key, ctx.role, sample.shape[1:], "normal", sigma.dtype)
        grad_sigma = rows(wide * noise).sum(dim=1)
    return grad_sample, grad_alpha, grad_sigma, grad_noise, None, None, None


torch.library.register_autograd("erasediff::add_noise", backward, setup_context=setup_context)
