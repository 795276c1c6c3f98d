"""|r|^2, <r, g> and |g|^2 of two gradients in one read of both."""

from collections.abc import Sequence

import torch
from torch import Tensor

from erasediff_kernels import _dispatch
from erasediff_kernels._storage import is_dense
from erasediff_kernels.ops._checks import DATA_DTYPES
from erasediff_kernels.ops._lists import check_device, check_dtypes, check_masks, check_shapes, in_layout_of


def gradient_gram(retain: Sequence[Tensor], forget: Sequence[Tensor], masks: Sequence[Tensor] = ()) -> Tensor:
    """The inner products that the whole constrained step rests on: the multiplier, the norm of the combination and
    whether anything is infinite or NaN all follow from these three numbers.

    Args:
        retain: gradients r of the retain loss, one tensor per parameter; any shape, strides and floating dtype.
        forget: gradients g of the forget loss, of the same shapes; or empty, and <r, g> = |g|^2 = 0.
        masks: empty, or one packed mask per tensor (`pack_mask`) in the storage order of `retain`: masked-out elements
            count as 0.

    Returns:
        float64 [3] = (|r|^2, <r, g>, |g|^2), accumulated in fp64 or better, the same bits in each run.

    Raises:
        ValueError: for lists that do not match, or an empty `retain`.
    """
    if not retain:
        raise ValueError("retain is empty; give at least one gradient")
    compiled = _dispatch.fast_path("gradient_gram", retain, forget, masks)
    if compiled is not None:
        gram: Tensor | None = compiled(retain, forget, masks)
        if gram is not None:
            return gram
    device = retain[0].device
    check_device("retain", retain, device)
    check_dtypes("retain", retain, DATA_DTYPES)
    if not all(map(is_dense, retain)):
        retain = [tensor if is_dense(tensor) else tensor.contiguous() for tensor in retain]
    if forget:
        check_shapes("forget", forget, "retain", retain)
        check_device("forget", forget, device)
        check_dtypes("forget", forget, DATA_DTYPES)
        forget = in_layout_of(retain, forget)
    check_masks(masks, retain)
    check_device("masks", masks, device)
    result: Tensor = torch.ops.erasediff.gradient_gram(list(retain), list(forget), list(masks))
    return result
