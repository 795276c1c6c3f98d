"""Norm, clip scale and finite flag of a given combination of the two gradients, from the Gram values alone."""

import torch
from torch import Tensor

from erasediff_kernels.ops._checks import check_gram, check_max_norm
from erasediff_kernels.ops.constraint_multiplier import Constraint


def clip_combination(gram: Tensor, coefficients: Tensor, *, max_norm: float | None = None) -> Constraint:
    """The constraint that makes an update follow delta = clip_scale (a r + b g), for coefficients from any rule.

    |a r + b g|^2 = a^2 |r|^2 + 2 a b <r, g> + b^2 |g|^2; clipping is that of `torch.nn.utils.clip_grad_norm_`. With
    a = 1 and b = lambda the result is that of `constraint_multiplier`, bit for bit.

    Args:
        gram: float64 [3] from `gradient_gram`, summed over ranks where gradients are sharded.
        coefficients: float64 or float32 [2] = (a, b) on the device of `gram`: of the retain gradient r and of the
            forget gradient g. They are rounded to float32, and nothing is read back to the host.
        max_norm: largest norm of the step; None for no clipping.

    Returns:
        Constraint whose `multiplier` is (a, b) as float32 [2]. `finite` is False where a Gram value, a coefficient or
        the norm is infinite or NaN.

    Raises:
        ValueError: for another shape, dtype or device of gram or coefficients, or a max_norm that is not positive.
    """
    check_gram(gram)
    if coefficients.shape != (2,) or coefficients.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"coefficients are {coefficients.dtype} with shape {tuple(coefficients.shape)}; give (a, b) as float64 or "
            "float32 [2], as torch.stack makes it"
        )
    if coefficients.device != gram.device:
        raise ValueError(f"coefficients are on {coefficients.device}, but gram is on {gram.device}; move them there")
    check_max_norm(max_norm)
    return Constraint(*torch.ops.erasediff.clip_combination(gram, coefficients, max_norm))
