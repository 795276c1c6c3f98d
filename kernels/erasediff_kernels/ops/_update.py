"""Running and checking of an update, shared by `constrained_adamw_` and `constrained_sgd_`."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from erasediff_kernels import _dispatch
from erasediff_kernels.ops._checks import DATA_DTYPES
from erasediff_kernels.ops._lists import (
    check_dense,
    check_device,
    check_dtypes,
    check_layout,
    check_masks,
    check_scalar,
    check_shapes,
    in_layout_of,
)
from erasediff_kernels.reference.moment_codes import BLOCK

# Parameters that 8-bit moments exist for.
CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALARS = (torch.float32, torch.float64)


def run_update(
    op: str,
    params: Sequence[Tensor],
    states: tuple[Sequence[Tensor], ...],
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    shadows: tuple[Sequence[Tensor], Sequence[Tensor]],
    masks: Sequence[Tensor],
    scalars: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    hyper: tuple[float, ...],
    rounding_key: Tensor | None,
    check_moments: Callable[[], Mapping[str, Sequence[Tensor]]],
) -> None:
    """One update, in the order of the operators' schemas.

    Args:
        op: name of the operator.
        params, states, retain, forget, masks, hyper, rounding_key: as in its schema.
        shadows: (ema, copies), which are written after the parameters.
        scalars: (multiplier, clip_scale, finite, lr, step).
        check_moments: checks those states that `check_update` does not, and returns the others by name.
    """
    ema, copies = shadows
    multiplier, clip_scale, finite, lr, step = scalars
    rest = (*scalars, *hyper, rounding_key)
    compiled = _dispatch.fast_path(op, params, *states, retain, forget, *shadows, masks)
    if compiled is None or not compiled(params, *states, retain, forget, *shadows, masks, *rest):
        check_update(
            params,
            check_moments(),
            {"retain": retain, "forget": forget},
            {"ema": ema, "copies": copies},
            masks,
            multiplier,
            {"clip_scale": clip_scale, "lr": lr},
            finite,
            step,
            rounding_key,
        )
        getattr(torch.ops.erasediff, op)(
            list(params),
            *map(list, states),
            in_layout_of(params, retain),
            in_layout_of(params, forget) if forget else [],
            *map(list, shadows),
            list(masks),
            *rest,
        )
    mark_written(params, *states, ema, copies, (step,))


def check_update(
    params: Sequence[Tensor],
    moments: Mapping[str, Sequence[Tensor]],
    gradients: Mapping[str, Sequence[Tensor]],
    shadows: Mapping[str, Sequence[Tensor]],
    masks: Sequence[Tensor],
    multiplier: Tensor,
    scalars: Mapping[str, Tensor],
    finite: Tensor,
    step: Tensor,
    rounding_key: Tensor | None,
) -> None:
    """Check everything that the kernels rely on; `forget` and the shadows may be empty."""
    device = params[0].device if params else finite.device
    check_device("params", params, device)
    check_dtypes("params", params, DATA_DTYPES)
    check_dense("params", params)
    for name, tensors in (*moments.items(), *shadows.items()):
        if name in shadows and not tensors:
            continue
        check_shapes(name, tensors, "params", params)
        check_device(name, tensors, device)
        check_dtypes(name, tensors, DATA_DTYPES)
        check_layout(name, tensors, "params", params)
    for name, tensors in moments.items():
        if {tensor.dtype for tensor in tensors} <= {torch.float32}:
            continue
        for index, (tensor, p) in enumerate(zip(tensors, params, strict=True)):
            if tensor.dtype is not torch.float32 and tensor.dtype is not p.dtype:
                raise ValueError(
                    f"{name}[{index}] is {tensor.dtype} for a {p.dtype} parameter; use float32 or {p.dtype}"
                )
    for name, tensors in gradients.items():
        if name == "forget" and not tensors:
            continue
        check_shapes(name, tensors, "params", params)
        check_device(name, tensors, device)
        check_dtypes(name, tensors, DATA_DTYPES)
    check_masks(masks, params)
    check_device("masks", masks, device)
    if multiplier.dim() == 1:
        check_coefficients(multiplier, device)
    else:
        check_scalar("multiplier", multiplier, device, SCALARS)
    for name, scalar in scalars.items():
        check_scalar(name, scalar, device, SCALARS)
    check_scalar("finite", finite, device, (torch.bool,))
    check_scalar("step", step, device, (torch.float32,))
    if rounding_key is not None and (
        rounding_key.dtype != torch.int64 or rounding_key.shape != (2,) or rounding_key.device != device
    ):
        raise ValueError(
            f"rounding_key is {rounding_key.dtype} with shape {tuple(rounding_key.shape)} on {rounding_key.device}; "
            f"give int64 (seed, step), shape (2,), on {device}"
        )


def check_coefficients(coefficients: Tensor, device: torch.device) -> None:
    """Check both coefficients of a combination, given as the multiplier."""
    if (
        coefficients.shape != (2,)
        or coefficients.dtype not in SCALARS
        or coefficients.device != device
        or not coefficients.is_contiguous()
    ):
        raise ValueError(
            f"multiplier is {coefficients.dtype} with shape {tuple(coefficients.shape)} and strides "
            f"{coefficients.stride()} on {coefficients.device}; give a 0-D tensor, or both coefficients as a "
            f"contiguous [2], of {' or '.join(map(str, SCALARS))} on {device}"
        )


def check_codes(
    name: str, codes: Sequence[Tensor], dtype: torch.dtype, absmaxes: Sequence[Tensor], params: Sequence[Tensor]
) -> None:
    """Check a moment of 8 bits: codes in the layout of the parameters, and the absmax of each block of 256 elements."""
    check_shapes(name, codes, "params", params)
    check_dtypes(name, codes, (dtype,))
    check_layout(name, codes, "params", params)
    check_dtypes("params", params, CODED_DTYPES)
    if len(absmaxes) != len(codes):
        raise ValueError(f"{len(absmaxes)} absmaxes for {len(codes)} {name}; give one for each")
    for index, (code, absmax) in enumerate(zip(codes, absmaxes, strict=True)):
        blocks = (code.numel() + BLOCK - 1) // BLOCK
        if absmax.dtype is not torch.float32 or absmax.shape != (blocks,) or not absmax.is_contiguous():
            raise ValueError(
                f"the absmax of {name}[{index}] is {absmax.dtype} with shape {tuple(absmax.shape)}, but "
                f"{code.numel()} elements need float32 ({blocks},); make it with torch.zeros"
            )
        if code.device != params[index].device or absmax.device != params[index].device:
            raise ValueError(f"{name}[{index}] or its absmax is on another device than the parameter; move it there")


def mark_written(*lists: Sequence[Tensor]) -> None:
    """Mark tensors as changed for autograd; under torch.compile the functionalised graph does it."""
    if not torch.compiler.is_compiling():
        for tensors in lists:
            torch.autograd.graph.increment_version(tensors)
