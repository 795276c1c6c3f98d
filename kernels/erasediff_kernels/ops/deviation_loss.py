"""The forget loss: weighted mean squared error against a target that deviates from the denoising one."""

from typing import NamedTuple

import torch
from torch import Tensor

from erasediff_kernels.ops import _loss
from erasediff_kernels.ops._checks import check_choice, check_data, check_given_or_drawn, sample_weight
from erasediff_kernels.ops.philox import DISTRIBUTIONS


class DeviationLoss(NamedTuple):
    """A loss, 0-D, and its gradient with respect to the prediction."""

    loss: Tensor
    grad: Tensor


def deviation_loss(
    prediction: Tensor,
    *,
    target: Tensor | None = None,
    distribution: str = "uniform",
    weight: Tensor | None = None,
    sample_ids: Tensor | None = None,
    key: Tensor | None = None,
    role: int = 0,
) -> DeviationLoss:
    """sum_b weight_b mean_e (prediction - target)^2 against a given target or one drawn in the kernel.

    EraseDiff (arXiv 2401.05779) makes the model predict noise on the forget set that has nothing to do with the noise
    in x_t: drawn from U(0, 1), distribution="uniform", as published; or from N(0, 1), "normal".

    Args:
        prediction: [B, ...], float32, bfloat16, float16 or float64, any strides.
        target: like `prediction`; or leave it out and give the address of the noise:
        sample_ids, key, role: as in `philox_bits`; `distribution` says what to draw.
        weight: [B], floating; it carries the 1/B. None means 1/B each.

    Returns:
        (loss, grad), as `denoising_loss`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match, or with both or neither of target and address.
    """
    check_data("prediction", prediction)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    check_given_or_drawn("target", target, sample_ids, key, role, prediction)
    weight = sample_weight(weight, prediction)
    return DeviationLoss(
        *torch.ops.erasediff.deviation_loss(prediction, weight, target, sample_ids, key, role, distribution)
    )


_loss.register("deviation_loss")
