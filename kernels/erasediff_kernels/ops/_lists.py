"""Checks on lists of tensors. They run once per step over lists that may hold thousands of tensors: keep them cheap.

`csrc/lists.h` checks the same in C++, for two reasons: there it costs nanoseconds per tensor rather than microseconds,
and a compiled kernel reads raw pointers, so it must not rely on its caller. These here say what is wrong, convert what
can be converted, and serve the backends that are not compiled. `tests/kernels/test_list_checks.py` holds both to the
same verdict."""

from collections.abc import Sequence

import torch
from torch import Tensor

from erasediff_kernels._storage import has_layout_of, is_dense


def check_shapes(name: str, tensors: Sequence[Tensor], like_name: str, likes: Sequence[Tensor]) -> None:
    """Check for as many tensors as `likes`, of the same shapes."""
    if len(tensors) != len(likes):
        raise ValueError(f"{name} has {len(tensors)} tensors, but {like_name} has {len(likes)}; give one for each")
    if [t.shape for t in tensors] != [t.shape for t in likes]:
        index = next(i for i, (t, like) in enumerate(zip(tensors, likes, strict=True)) if t.shape != like.shape)
        raise ValueError(
            f"{name}[{index}] has shape {tuple(tensors[index].shape)}, but {like_name}[{index}] has "
            f"{tuple(likes[index].shape)}; make them the same"
        )


def check_device(name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    others = {t.device for t in tensors} - {device}
    if others:
        raise ValueError(f"{name} has a tensor on {others.pop()}, but others are on {device}; move it there")


def check_dtypes(name: str, tensors: Sequence[Tensor], allowed: Sequence[torch.dtype]) -> None:
    others = {t.dtype for t in tensors}.difference(allowed)
    if others:
        raise ValueError(f"{name} has a tensor of {others.pop()}; supported are {', '.join(map(str, allowed))}")


def check_layout(name: str, tensors: Sequence[Tensor], like_name: str, likes: Sequence[Tensor]) -> None:
    """Check for the layouts of `likes`, which are dense: tensors that are written to cannot be copied into another."""
    if all(map(Tensor.is_contiguous, tensors)) and all(map(Tensor.is_contiguous, likes)):
        return
    for index, (tensor, like) in enumerate(zip(tensors, likes, strict=True)):
        if not has_layout_of(tensor, like):
            raise ValueError(
                f"{name}[{index}] has strides {tensor.stride()}, but {like_name}[{index}] has {like.stride()}; "
                "make it with torch.empty_like, which keeps the strides"
            )


def check_dense(name: str, tensors: Sequence[Tensor]) -> None:
    if all(map(Tensor.is_contiguous, tensors)):
        return
    for index, tensor in enumerate(tensors):
        if not is_dense(tensor):
            raise ValueError(
                f"{name}[{index}] has shape {tuple(tensor.shape)} and strides {tensor.stride()}, which leaves gaps in "
                "memory or overlaps; make it contiguous"
            )


def in_layout_of(likes: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Convert tensors to the layouts of `likes`: themselves where they have them, copies elsewhere."""
    if all(map(Tensor.is_contiguous, tensors)) and all(map(Tensor.is_contiguous, likes)):
        return list(tensors)
    return [
        tensor if has_layout_of(tensor, like) else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        for tensor, like in zip(tensors, likes, strict=True)
    ]


def check_masks(masks: Sequence[Tensor], likes: Sequence[Tensor]) -> None:
    """Check for one packed mask per tensor, uint8 [ceil(n / 8)], or none at all."""
    if not masks:
        return
    if len(masks) != len(likes):
        raise ValueError(f"masks has {len(masks)} tensors for {len(likes)} parameters; give one for each, or none")
    for index, (mask, like) in enumerate(zip(masks, likes, strict=True)):
        expected = (like.numel() + 7) // 8
        if mask.dtype != torch.uint8 or mask.shape != (expected,) or not mask.is_contiguous():
            raise ValueError(
                f"masks[{index}] is {mask.dtype} with shape {tuple(mask.shape)}, but {like.numel()} elements need "
                f"uint8 ({expected},); make it with pack_mask"
            )


def check_scalar(name: str, tensor: Tensor, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    """Check for a 0-D tensor on the device of the lists."""
    if tensor.dim() != 0 or tensor.dtype not in dtypes or tensor.device != device:
        raise ValueError(
            f"{name} is {tensor.dtype} with shape {tuple(tensor.shape)} on {tensor.device}; give a 0-D tensor of "
            f"{' or '.join(map(str, dtypes))} on {device}"
        )
