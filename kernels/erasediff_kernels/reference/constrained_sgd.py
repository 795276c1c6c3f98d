"""Reference of `constrained_sgd_`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from erasediff_kernels._storage import unpack_bits
from erasediff_kernels.reference.update import combine, flatten, write, write_params


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
