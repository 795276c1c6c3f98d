"""Parameters that are sent together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def in_buckets(parameters: Iterable[Any], numel_of: Callable[[Any], int], limit: int) -> Iterator[list[Any]]:
    """In their order, of one dtype, and up to ``limit`` elements if it is more than one parameter."""
    together: list[Any] = []
    numel = 0
    for parameter in parameters:
        is_full = numel + numel_of(parameter) > limit
        if together and (is_full or parameter.dtype != together[0].dtype):
            yield together
            together, numel = [], 0
        together.append(parameter)
        numel += numel_of(parameter)
    if together:
        yield together
