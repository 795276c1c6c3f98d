"""Reference of `constrained_adamw_` and `constrained_sgd_`.

Lists of tensors go through `torch._foreach_*`, which changes nothing in the meaning and is fast enough for small
models. The finite flag is applied with `torch.where`, so nothing here waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from erasediff_kernels._storage import flat, unpack_bits
from erasediff_kernels.reference import moment_codes
from erasediff_kernels.reference.rounding import random_words, stochastic_round


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


@torch.no_grad()
def constrained_sgd_(
    params: list[Tensor],
    momentum_buffers: list[Tensor],
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
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    ema_decay: float,
    rounding_key: Tensor | None,
) -> None:
    step += finite
    if not params:
        return
    dtypes = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in params]
    scalar_dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    delta = combine(retain, forget, multiplier, clip_scale, dtypes)
    keep = [finite & unpack_bits(mask, q.numel()) for mask, q in zip(masks, params, strict=True)] if masks else None
    direction: Sequence[Tensor] = delta
    if momentum_buffers:
        buffers = torch._foreach_mul(flatten(momentum_buffers, dtypes), momentum)
        torch._foreach_add_(buffers, delta)
        direction = torch._foreach_add(delta, buffers, alpha=momentum) if nesterov else buffers
        write(momentum_buffers, buffers, keep, finite)
    rate = lr.double()
    p = torch._foreach_mul(flatten(params, dtypes), (1.0 - rate * weight_decay).to(scalar_dtype))
    torch._foreach_sub_(p, torch._foreach_mul(list(direction), rate.to(scalar_dtype)))
    write_params(params, p, keep, finite, ema, copies, ema_decay, rounding_key)


def flatten(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """1-D views in storage order, or copies where the dtype has to change."""
    return [flat(tensor).to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]


def combine(
    retain: list[Tensor],
    forget: list[Tensor],
    multiplier: Tensor,
    clip_scale: Tensor,
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """delta = clip_scale (retain + multiplier forget)."""
    if not forget:
        return list(torch._foreach_mul(flatten(retain, dtypes), clip_scale))
    delta = torch._foreach_mul(flatten(forget, dtypes), multiplier)
    torch._foreach_add_(delta, flatten(retain, dtypes))
    torch._foreach_mul_(delta, clip_scale)
    return list(delta)


def write(olds: list[Tensor], news: Sequence[Tensor], keep: list[Tensor] | None, finite: Tensor) -> None:
    """Write the new values over the old where the step is finite and the element is not frozen."""
    for index, (old, new) in enumerate(zip(olds, news, strict=True)):
        flat_old = flat(old)
        flat_old.copy_(torch.where(finite if keep is None else keep[index], new.to(old.dtype), flat_old))


def write_codes(
    codes: list[Tensor], absmaxes: list[Tensor], news: Sequence[tuple[Tensor, Tensor]], finite: Tensor
) -> None:
    write(codes, [new for new, _ in news], None, finite)
    write(absmaxes, [new for _, new in news], None, finite)


def write_params(
    params: list[Tensor],
    news: Sequence[Tensor],
    keep: list[Tensor] | None,
    finite: Tensor,
    ema: list[Tensor],
    copies: list[Tensor],
    ema_decay: float,
    rounding_key: Tensor | None,
) -> None:
    """Round and write the parameters, then whatever follows them. EMA and copies see the parameter as it was stored."""
    if rounding_key is not None:
        news = [
            stochastic_round(new, p.dtype, random_words(index, rounding_key, new.numel()))
            if p.dtype in (torch.bfloat16, torch.float16)
            else new
            for index, (p, new) in enumerate(zip(params, news, strict=True))
        ]
    write(params, news, keep, finite)
    for average, p in zip(ema, params, strict=True) if ema else ():
        wide = torch.float64 if average.dtype == torch.float64 else torch.float32
        old = flat(average).to(wide)
        new = old + (1.0 - ema_decay) * (flat(p).to(wide) - old)
        write([average], [new], None, finite)
    for copy, p in zip(copies, params, strict=True) if copies else ():
        write([copy], [flat(p)], None, finite)
