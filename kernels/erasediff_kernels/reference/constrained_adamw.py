"""Reference of `constrained_adamw_`."""

import torch
from torch import Tensor

from erasediff_kernels._storage import flat, unpack_bits
from erasediff_kernels.reference import moment_codes
from erasediff_kernels.reference.update import combine, flatten, write, write_codes, write_params


@torch.no_grad()
def constrained_adamw_(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_absmaxes: list[Tensor],
    exp_avg_sq_absmaxes: list[Tensor],
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
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    rounding_key: Tensor | None,
) -> None:
    step += finite
    if not params:
        return
    dtypes = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in params]
    scalar_dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    t, rate = step.double(), lr.double()
    step_size = (rate / (1.0 - beta1**t)).to(scalar_dtype)
    root_correction = (1.0 - beta2**t).sqrt().to(scalar_dtype)

    delta = combine(retain, forget, multiplier, clip_scale, dtypes)
    coded = bool(exp_avg_absmaxes)
    if coded:
        old_m = list(map(moment_codes.decode_signed, map(flat, exp_avgs), exp_avg_absmaxes))
        old_v = list(map(moment_codes.decode_unsigned, map(flat, exp_avg_sqs), exp_avg_sq_absmaxes))
    else:
        old_m, old_v = flatten(exp_avgs, dtypes), flatten(exp_avg_sqs, dtypes)
    m = torch._foreach_mul(old_m, beta1)
    torch._foreach_add_(m, delta, alpha=1.0 - beta1)
    v = torch._foreach_mul(old_v, beta2)
    torch._foreach_addcmul_(v, delta, delta, value=1.0 - beta2)
    denominator = torch._foreach_sqrt(v)
    torch._foreach_div_(denominator, root_correction)
    torch._foreach_add_(denominator, eps)
    direction = torch._foreach_div(m, denominator)
    torch._foreach_mul_(direction, step_size)
    p = torch._foreach_mul(flatten(params, dtypes), (1.0 - rate * weight_decay).to(scalar_dtype))
    torch._foreach_sub_(p, direction)

    keep = [finite & unpack_bits(mask, q.numel()) for mask, q in zip(masks, params, strict=True)] if masks else None
    if coded:
        # A block shares its absmax, so frozen elements are written again, from what their codes stand for.
        if keep is not None:
            m = tuple(torch.where(k, new, old) for k, new, old in zip(keep, m, old_m, strict=True))
            v = tuple(torch.where(k, new, old) for k, new, old in zip(keep, v, old_v, strict=True))
        write_codes(exp_avgs, exp_avg_absmaxes, [moment_codes.encode_signed(values) for values in m], finite)
        unsigned = [moment_codes.encode_unsigned(values, step) for values in v]
        write_codes(exp_avg_sqs, exp_avg_sq_absmaxes, unsigned, finite)
    else:
        write(exp_avgs, m, keep, finite)
        write(exp_avg_sqs, v, keep, finite)
    write_params(params, p, keep, finite, ema, copies, ema_decay, rounding_key)
