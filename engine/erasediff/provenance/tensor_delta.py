"""Bits in which two tensors differ, compressed, by which either is made of the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from erasediff.io.tensor_file import tensor_bytes

LEVEL = 3
Bits = np.ndarray[Any, np.dtype[np.uint8]]


def compress(content: bytes | memoryview) -> bytes:
    """Compress by zstd."""
    compressed: bytes = pa.Codec("zstd", compression_level=LEVEL).compress(content, asbytes=True)
    return compressed


def decompress(content: bytes | memoryview, size: int) -> bytes:
    """Undo ``compress`` to ``size`` bytes. ValueError where it yields another number of them, or is damaged."""
    if size == 0:
        return b""
    try:
        whole: bytes = pa.Codec("zstd").decompress(content, size, asbytes=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(str(error)) from None
    return whole


def common_dtype(one: torch.dtype, other: torch.dtype) -> torch.dtype | None:
    """Dtype that holds every value of both exactly: the same one, or a floating one; None for none."""
    if one == other:
        return one
    if not (one.is_floating_point and other.is_floating_point):
        return None
    # torch promotes no 8-bit dtype.
    small, large = sorted((one, other), key=lambda dtype: dtype.itemsize)
    if small.itemsize == 1:
        return large if large.itemsize > 1 else torch.float32
    return torch.promote_types(one, other)


def delta(before: Tensor, after: Tensor) -> bytes | None:
    """Compressed XOR of two tensors of the same number of elements, in their common dtype.

    The bytes of equal significance lie together, so that the leading ones, which are mostly zero, compress well.

    Returns:
        None where one of the tensors could not be made of the other again, such as one of integers and one of floats,
        or one with a NaN whose payload another dtype loses.
    """
    wide = common_dtype(before.dtype, after.dtype)
    if wide is None:
        return None
    difference = _bits(before.to(wide)) ^ _bits(after.to(wide))
    for tensor in (before, after):
        if not np.array_equal(_bits(tensor.to(wide).to(tensor.dtype)), _bits(tensor)):
            return None
    return compress(np.ascontiguousarray(difference.reshape(-1, wide.itemsize).T).data)


def apply_delta(source: Tensor, change: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor of ``dtype`` and ``shape`` that differs from ``source`` by a ``delta``, in either direction.

    ValueError for a change that does not fit.
    """
    wide = common_dtype(source.dtype, dtype)
    if wide is None or source.numel() != int(np.prod(shape)):
        raise ValueError("its change is of another tensor")
    if not source.numel():
        return torch.empty(shape, dtype=dtype)
    planes = np.frombuffer(decompress(change, source.numel() * wide.itemsize), np.uint8)
    bits = _bits(source.to(wide)) ^ planes.reshape(wide.itemsize, -1).T.reshape(-1)
    return torch.from_numpy(bits).view(wide).to(dtype).reshape(shape)


def _bits(tensor: Tensor) -> Bits:
    return np.frombuffer(tensor_bytes(tensor), np.uint8)
