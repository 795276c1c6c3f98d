"""Hashes of weights: the same for the same bits, wherever they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor

from erasediff.models.tensor_file import tensor_bytes


def fingerprint(described: object, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, in hex, over ``described`` (by its repr) and each tensor's name, dtype, shape and elements, in order."""
    digest = hashlib.sha256(repr(described).encode())
    for name, tensor in tensors:
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
