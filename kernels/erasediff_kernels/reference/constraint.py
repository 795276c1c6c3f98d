"""Reference of `gradient_gram`, `constraint_multiplier` and `clip_combination`."""

import torch
from torch import Tensor

from erasediff_kernels._storage import flat, has_layout_of, is_dense, unpack_bits


def gradient_gram(retain: list[Tensor], forget: list[Tensor], masks: list[Tensor]) -> Tensor:
    zero = retain[0].new_zeros((), dtype=torch.float64)
    products = []
    for index, r in enumerate(retain):
        pair = [r, forget[index]] if forget else [r]
        same_layout = is_dense(r) and all(has_layout_of(t, r) for t in pair)
        pair = [(flat(t) if same_layout else t.reshape(-1)).double() for t in pair]
        if masks:
            kept = unpack_bits(masks[index], r.numel())
            pair = [torch.where(kept, t, 0.0) for t in pair]
        if forget:
            r64, g64 = pair
            products.append(torch.stack((r64.dot(r64), r64.dot(g64), g64.dot(g64))))
        else:
            products.append(torch.stack((pair[0].dot(pair[0]), zero, zero)))
    return torch.stack(products).sum(dim=0)


def constraint_multiplier(
    gram: Tensor, barrier: str, eta: float, gap: Tensor | None, max_norm: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rr, rf, ff = gram.double().unbind()
    divisor = torch.where(ff == 0.0, 1.0, ff)
    if barrier == "fixed":
        multiplier = torch.full_like(ff, eta)
    else:
        if barrier == "norm":
            multiplier = eta - rf / divisor
        elif barrier == "gap":
            assert gap is not None
            multiplier = (eta * gap.double().clamp_min(0.0) - rf) / divisor
        elif barrier == "cosine":
            product = rr * ff
            multiplier = eta - rf / torch.where(product == 0.0, 1.0, product).sqrt()
        else:
            raise AssertionError(barrier)
        multiplier = torch.where(ff == 0.0, 0.0, multiplier.clamp_min(0.0))
    coefficients = torch.stack((torch.ones_like(multiplier), multiplier))
    rounded, clip_scale, norm, finite = clip_combination(gram, coefficients, max_norm)
    if gap is not None:
        finite = finite & torch.isfinite(gap)
    return rounded[1].clone(), clip_scale, norm, finite


def clip_combination(
    gram: Tensor, coefficients: Tensor, max_norm: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rr, rf, ff = gram.double().unbind()
    # The norm of the combination that will be applied, hence with the coefficients as fp32 holds them.
    rounded = coefficients.float()
    a, b = rounded.double().unbind()
    norm = (a * a * rr + 2.0 * a * b * rf + b * b * ff).clamp_min(0.0).sqrt()
    clip_scale = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp_max(1.0)
    finite = torch.isfinite(gram).all() & torch.isfinite(norm)
    return rounded.clone(), clip_scale.float(), norm.float(), finite
