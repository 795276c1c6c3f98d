"""The retain loss: weighted mean squared error against the denoising target, and its gradient, in one pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from erasediff_kernels.ops import _loss
from erasediff_kernels.ops._checks import (
    check_choice,
    check_data,
    check_given_or_drawn,
    check_like,
    per_sample,
    sample_weight,
)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


class DenoisingLoss(NamedTuple):
    """A loss, 0-D, and its gradient with respect to the prediction."""

    loss: Tensor
    grad: Tensor


def denoising_loss(
    prediction: Tensor,
    sample: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    prediction_type: str = "epsilon",
    weight: Tensor | None = None,
    noise: Tensor | None = None,
    sample_ids: Tensor | None = None,
    key: Tensor | None = None,
    role: int = 0,
) -> DenoisingLoss:
    """sum_b weight_b mean_e (prediction - target)^2, where x_t = alpha sample + sigma noise was predicted from.

    | prediction_type (as in diffusers) | target |
    |---|---|
    | "epsilon" | noise |
    | "v_prediction" | alpha noise - sigma sample |
    | "sample" | sample |
    | "flow_prediction" | noise - sample |

    Args:
        prediction: [B, ...], float32, bfloat16, float16 or float64, any strides.
        sample: x_0, like `prediction`.
        alpha, sigma: [B], floating.
        weight: [B], floating, e.g. min-SNR; it carries the 1/B. None means 1/B each.
        noise: like `prediction`; or leave it out and give the address it was drawn from in `add_noise`:
        sample_ids, key, role: as in `philox_bits`. Drawn noise is used in fp32 and never touches memory.

    Returns:
        (loss, grad): 0-D float32 (float64 for float64), differentiable in `prediction` only; and the gradient, like
        `prediction` and contiguous, for `prediction.backward(grad)`, which saves the backward pass of the loss.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match, an unknown prediction type, or with both or neither
            of noise and address.
    """
    check_data("prediction", prediction)
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    check_like("sample", sample, "prediction", prediction)
    if prediction_type != "sample" or noise is not None:
        check_given_or_drawn("noise", noise, sample_ids, key, role, prediction)
    alpha, sigma = per_sample("alpha", alpha, prediction), per_sample("sigma", sigma, prediction)
    weight = sample_weight(weight, prediction)
    return DenoisingLoss(
        *torch.ops.erasediff.denoising_loss(
            prediction, sample, alpha, sigma, weight, noise, sample_ids, key, role, prediction_type
        )
    )


_loss.register("denoising_loss")
