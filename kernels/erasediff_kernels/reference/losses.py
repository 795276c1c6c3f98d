"""Reference of `denoising_loss` and `deviation_loss`: a weighted squared error and its gradient."""

from torch import Tensor

from erasediff_kernels.reference.noise import given_or_drawn, per_sample, rows, widen


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
    x = widen(sample)
    if prediction_type == "sample":
        return squared_error(prediction, x, weight)
    epsilon = given_or_drawn(noise, prediction, sample_ids, key, role, "normal")
    if prediction_type == "epsilon":
        target = epsilon
    elif prediction_type == "v_prediction":
        target = per_sample(alpha, x) * epsilon - per_sample(sigma, x) * x
    elif prediction_type == "flow_prediction":
        target = epsilon - x
    else:
        raise AssertionError(prediction_type)
    return squared_error(prediction, target, weight)


def deviation_loss(
    prediction: Tensor,
    weight: Tensor,
    target: Tensor | None,
    sample_ids: Tensor | None,
    key: Tensor | None,
    role: int,
    distribution: str,
) -> tuple[Tensor, Tensor]:
    deviated = given_or_drawn(target, prediction, sample_ids, key, role, distribution)
    return squared_error(prediction, deviated, weight)


def squared_error(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(sum_b weight_b mean_e (prediction - target)^2, its gradient with respect to the prediction)."""
    error = widen(prediction) - target
    numel = max(1, error[:1].numel())
    loss = (rows(error).double().square().sum(dim=1) * (weight.double() / numel)).sum().to(error.dtype)
    grad = error * per_sample(2.0 * weight / numel, error)
    return loss, grad.to(prediction.dtype).contiguous()
