"""Checks shared by `constrained_adamw_` and `constrained_sgd_`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from erasediff_kernels.ops._checks import DATA_DTYPES
from erasediff_kernels.ops._lists import (
    check_dense,
    check_device,
    check_dtypes,
    check_layout,
    check_masks,
    check_scalar,
    check_shapes,
)

SCALARS = (torch.float32, torch.float64)


def check_update(
    params: Sequence[Tensor],
    moments: Mapping[str, Sequence[Tensor]],
    gradients: Mapping[str, Sequence[Tensor]],
    followers: Mapping[str, Sequence[Tensor]],
    masks: Sequence[Tensor],
    scalars: Mapping[str, Tensor],
    finite: Tensor,
    step: Tensor,
    rounding_key: Tensor | None,
) -> None:
    """Everything that the kernels rely on. Empty gradient lists other than "retain", and empty followers, are fine."""
    device = params[0].device if params else finite.device
    check_device("params", params, device)
    check_dtypes("params", params, DATA_DTYPES)
    check_dense("params", params)
    for name, tensors in (*moments.items(), *followers.items()):
        if name in followers and not tensors:
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
                    f"{name}[{index}] is {tensor.dtype} for a {p.dtype} parameter: use float32 or {p.dtype}"
                )
    for name, tensors in gradients.items():
        if name == "forget" and not tensors:
            continue
        check_shapes(name, tensors, "params", params)
        check_device(name, tensors, device)
        check_dtypes(name, tensors, DATA_DTYPES)
    check_masks(masks, params)
    check_device("masks", masks, device)
    for name, scalar in scalars.items():
        check_scalar(name, scalar, device, SCALARS)
    check_scalar("finite", finite, device, (torch.bool,))
    check_scalar("step", step, device, (torch.float32,))
    if rounding_key is not None and (
        rounding_key.dtype != torch.int64 or rounding_key.shape != (2,) or rounding_key.device != device
    ):
        raise ValueError(
            f"rounding_key is {rounding_key.dtype} with shape {tuple(rounding_key.shape)} on {rounding_key.device}: "
            f"give int64 (seed, step), shape (2,), on {device}"
        )


def mark_written(*lists: Sequence[Tensor]) -> None:
    """Tell autograd that these tensors changed. Under torch.compile the functionalised graph does it."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensors in lists for tensor in tensors])
