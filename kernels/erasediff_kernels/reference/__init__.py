"""Eager reference of every operator: torch only, fp32 or fp64 inside, the specification of the others."""

import importlib
from collections.abc import Callable
from typing import Any

from erasediff_kernels._library import OPS

DEVICES = frozenset({"cpu", "cuda"})


def implementation(op: str) -> Callable[..., Any]:
    """The eager function of an operator."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"{__name__}.{OPS[op].family}"), op)
    return function
