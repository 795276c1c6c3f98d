"""Bit masks for saliency and pruning, of the elements of a parameter that take part in the step."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from erasediff_kernels._storage import flat, is_dense, pack_bits, unpack_bits


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask to one bit per element, least significant bit first.

    The bits follow the mask's own order in memory. For a parameter that is not contiguous (e.g. channels_last) the mask
    must have the parameter's strides; what elementwise operations make of it, such as `param.abs() > t`, has.

    Args:
        mask: bool, dense, any shape; True: the element takes part, False: it is frozen.

    Returns:
        uint8 [ceil(n / 8)] on the same device.

    Raises:
        ValueError: if the mask is not boolean, or has gaps in memory.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; compare it with something first, it must be torch.bool")
    if not is_dense(mask):
        raise ValueError(
            f"mask has strides {mask.stride()}, which leaves gaps in memory or overlaps; make it contiguous"
        )
    return pack_bits(flat(mask))


def unpack_mask(packed: Tensor, shape: int | Sequence[int] | Tensor) -> Tensor:
    """Undo `pack_mask`.

    Args:
        packed: uint8 [ceil(n / 8)].
        shape: the mask's shape, or its number of elements, or a tensor with its shape and strides.

    Returns:
        bool of that shape (1-D for a number of elements) on the same device; True: the element takes part.

    Raises:
        ValueError: if the number of bytes is not that of the shape.
    """
    if isinstance(shape, Tensor):
        numel = shape.numel()
    else:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        numel = prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != ((numel + 7) // 8,):
        raise ValueError(
            f"packed is {packed.dtype} with shape {tuple(packed.shape)}, but {numel} elements need uint8 "
            f"({(numel + 7) // 8},)"
        )
    bits = unpack_bits(packed, numel)
    if isinstance(shape, Tensor):
        mask = torch.empty_like(shape, dtype=torch.bool)
        flat(mask).copy_(bits)
        return mask
    return bits.view(shape)
