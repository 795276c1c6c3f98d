"""The multiplier of the forget gradient, the clip scale and the finite flag, from the Gram values alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from erasediff_kernels.ops._checks import check_choice, check_gram, check_max_norm

BARRIERS = ("norm", "gap", "fixed", "cosine")


class Constraint(NamedTuple):
    """Coefficients of an update from two gradients, delta = clip_scale (a r + b g), as tensors on their device."""

    multiplier: Tensor
    """lambda, 0-D float32, where a = 1 and b = lambda; or (a, b), float32 [2]."""
    clip_scale: Tensor
    """Factor of the whole combination; 0-D float32."""
    norm: Tensor
    """|a r + b g|, before clipping; 0-D float32."""
    finite: Tensor
    """False where anything is infinite or NaN, and the step must be skipped; 0-D bool."""


def constraint_multiplier(
    gram: Tensor,
    barrier: str = "norm",
    eta: float = 0.1,
    *,
    gap: Tensor | None = None,
    max_norm: float | None = None,
) -> Constraint:
    """lambda = max(0, (a - <r, g>) / |g|^2), the dual solution of min |delta - r|^2 / 2 subject to <delta, g> >= a
    (EraseDiff, arXiv 2401.05779, after Gong et al. and Liu et al.).

    | barrier | lambda |
    |---|---|
    | "norm" | max(0, eta - <r, g> / |g|^2): a = eta |g|^2 |
    | "gap" | max(0, (eta max(gap, 0) - <r, g>) / |g|^2) |
    | "fixed" | eta |
    | "cosine" | max(0, eta - <r, g> / (|r| |g|)) |

    Where |g|^2 = 0 the multiplier is 0 ("fixed" stays eta). The norm is that of r + lambda g, from the Gram values;
    clipping is that of `torch.nn.utils.clip_grad_norm_`.

    Args:
        gram: float64 [3] from `gradient_gram`, summed over ranks where gradients are sharded.
        barrier, eta: which barrier, and its constant.
        gap: 0-D floating tensor L_f(theta) - L_f(phi_K), for barrier "gap".
        max_norm: the largest norm of the step; None leaves it as it is.

    Raises:
        ValueError: for an unknown barrier, a gap where the barrier takes none or the other way round, another shape or
            dtype of gram.
    """
    check_choice("barrier", barrier, BARRIERS)
    check_gram(gram)
    if (barrier == "gap") != (gap is not None):
        raise ValueError("barrier 'gap' needs gap=L_f(theta) - L_f(phi_K), and the other barriers take none")
    if gap is not None and (gap.dim() != 0 or not gap.dtype.is_floating_point or gap.device != gram.device):
        raise ValueError(
            f"gap is {gap.dtype} with shape {tuple(gap.shape)} on {gap.device}; give a 0-D floating tensor on "
            f"{gram.device}"
        )
    check_max_norm(max_norm)
    return Constraint(*torch.ops.erasediff.constraint_multiplier(gram, barrier, eta, gap, max_norm))
