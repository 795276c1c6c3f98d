"""The constrained step with AdamW: combination, clipping, decay, moments, EMA and low-precision copy in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from erasediff_kernels.ops._update import check_codes, run_update


def constrained_adamw_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    *,
    multiplier: Tensor,
    clip_scale: Tensor,
    finite: Tensor,
    lr: Tensor,
    step: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    ema: Sequence[Tensor] = (),
    ema_decay: float = 0.0,
    copies: Sequence[Tensor] = (),
    masks: Sequence[Tensor] = (),
    rounding_key: Tensor | None = None,
    exp_avg_absmaxes: Sequence[Tensor] = (),
    exp_avg_sq_absmaxes: Sequence[Tensor] = (),
) -> None:
    """AdamW (Loshchilov & Hutter, ICLR 2019) on a combination of two gradients, in place.

    delta = clip_scale (retain + multiplier forget), or clip_scale (a retain + b forget) where `multiplier` is (a, b).

    Nothing at all changes where `finite` is False. Otherwise step += 1 and, with t = step:

        p *= 1 - lr weight_decay
        m = beta1 m + (1 - beta1) delta
        v = beta2 v + (1 - beta2) delta^2
        p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
        ema += (1 - ema_decay) (p - ema)

    delta is never stored and nothing is read back to the host. Arithmetic is fp32, or fp64 for fp64 parameters.

    Args:
        params: float32, bfloat16, float16 or float64; dense, in any order of dimensions.
        exp_avgs, exp_avg_sqs: m and v, float32 or the parameter's dtype, with the parameter's shape and strides; or,
            where the absmaxes are given, codes of 8 bits for them, int8 and uint8.
        retain, forget: gradients of the parameters' shapes, any floating dtype; `forget` may be empty.
        multiplier, clip_scale, finite: from `constraint_multiplier` or `clip_combination`. `multiplier` is 0-D float32
            or float64, or both coefficients as a contiguous [2]; `clip_scale` 0-D of these types; `finite` 0-D bool.
        lr: 0-D float32 (or float64) tensor.
        step: 0-D float32 tensor, the number of applied steps; written.
        beta1, beta2, eps, weight_decay: as in `torch.optim.AdamW`.
        ema: empty, or running averages of the parameters, as they are stored, with decay `ema_decay`.
        copies: empty, or low-precision copies of the parameters, rounded to nearest.
        masks: empty, or one packed mask per parameter (`pack_mask`): frozen elements keep p, m and v.
        rounding_key: int64 [2] = (seed, step): round bfloat16 and float16 parameters stochastically with these random
            bits. None: round to nearest.
        exp_avg_absmaxes, exp_avg_sq_absmaxes: empty; or, for moments of 8 bits, the largest magnitude in each block of
            256 elements in storage order, float32 [ceil(n / 256)]; zeros to begin with, as the codes. Block-wise
            quantisation as in 2110.02861, with other codes: kernels/README.md. Not for float64 parameters. Frozen
            elements then keep their moments only up to the rounding of their block.

    Raises:
        ValueError: for lists, shapes, strides, dtypes or devices that do not match.
    """

    def check_moments() -> dict[str, Sequence[Tensor]]:
        if not (exp_avg_absmaxes or exp_avg_sq_absmaxes):
            return {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
        check_codes("exp_avgs", exp_avgs, torch.int8, exp_avg_absmaxes, params)
        check_codes("exp_avg_sqs", exp_avg_sqs, torch.uint8, exp_avg_sq_absmaxes, params)
        return {}

    run_update(
        "constrained_adamw_",
        params,
        (exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes),
        retain,
        forget,
        (ema, copies),
        masks,
        (multiplier, clip_scale, finite, lr, step),
        (beta1, beta2, eps, weight_decay, ema_decay),
        rounding_key,
        check_moments,
    )
