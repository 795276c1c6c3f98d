"""Checks for NaN and infinity: one pass over each tensor without a temporary, and one read from the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from erasediff.errors import UserError


def all_finite(tensor: Tensor) -> bool:
    """True if ``tensor`` holds neither NaN nor infinity; always true of integers."""
    return first_not_finite([("", tensor)]) is None


@torch.no_grad()
def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds NaN or infinity, None without one; all flags are read in one transfer.

    Args:
        tensors: Tensors of any dtype by name, on any devices. They are reduced one by one as they come.
    """
    names, flags = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() > 0:
            # fp8 has no reductions. Both extremes are NaN if any element is.
            values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            names.append(name)
            flags.append(torch.stack(values.detach().aminmax()).isfinite().all())
    if not flags:
        return None
    device = flags[0].device
    finite = torch.stack([flag.to(device, non_blocking=True) for flag in flags]).tolist()
    return next((name for name, is_finite in zip(names, finite, strict=True) if not is_finite), None)


@torch.no_grad()
def first_row_not_finite(tensors: Mapping[str, Tensor]) -> int | None:
    """Index of the first row of any of ``tensors`` [N, ...] that holds NaN or infinity, None without one."""
    rows = [tensor.isfinite().flatten(1).all(1) for tensor in tensors.values() if tensor.is_floating_point()]
    if not rows:
        return None
    finite = torch.stack(rows).all(0)
    return None if bool(finite.all()) else int((~finite).nonzero()[0])


def finite_weight(tensor: Tensor, owner: str, name: str) -> Tensor:
    """Return ``tensor``, the weight ``name`` of ``owner``. UserError naming both if it holds NaN or infinity."""
    if not all_finite(tensor):
        raise weights_not_finite(owner, name)
    return tensor


def weights_not_finite(owner: str, name: str) -> UserError:
    """Error of the weight ``name`` of ``owner``, such as "vae of FOLDER", that holds NaN or infinity."""
    return UserError(
        f"The {owner} has weights that are not finite: {name} holds NaN or infinity; give a model without them."
    )
