"""Eager combination and writing, shared by `constrained_adamw_` and `constrained_sgd_`.

Lists of tensors go through `torch._foreach_*`, which changes nothing in the meaning and is fast enough for small
models. The finite flag is applied with `torch.where`, so nothing here waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from erasediff_kernels._storage import flat
from erasediff_kernels.reference.rounding import random_words, stochastic_round


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
    """delta = clip_scale (coefficient retain + multiplier forget); the coefficient is 1 where `multiplier` is 0-D."""
    scaled = flatten(retain, dtypes)
    if multiplier.dim() == 1:
        coefficient, multiplier = multiplier.unbind()
        scaled = list(torch._foreach_mul(scaled, coefficient))
    if not forget:
        return list(torch._foreach_mul(scaled, clip_scale))
    delta = torch._foreach_mul(flatten(forget, dtypes), multiplier)
    torch._foreach_add_(delta, scaled)
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
