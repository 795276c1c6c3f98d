"""The compiled backend: the C++ and CUDA operators of `csrc/`, through the stable ABI.

An installation without the extension `_C` is supported: this backend then serves no device. An extension that is there
but cannot be loaded, or was built from other sources, is an error, since silently running something slower would hide
it.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from erasediff_kernels._library import OPS, Operator

NAMESPACE = "erasediff_compiled"
# How the table names the implementation for a device type, and what torch calls it.
LANGUAGES = {"cpu": "C++", "cuda": "CUDA"}
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
REBUILD = "build it again with `pip install --no-build-isolation -e .`, or delete it to run without"


def private_schema(row: Operator) -> str:
    """The schema of the compiled operator: no symbolic integers; one on lists also tells whether it accepted them."""
    schema = row.schema.replace("SymInt", "int")
    if row.checks_lists:
        arguments, _, result = schema.partition(" -> ")
        schema = f"{arguments} -> {'bool' if result == '()' else f'{result}?'}"
    return schema


def _load() -> frozenset[str]:
    """Import `_C` where there is one; the device types that it has kernels for."""
    if importlib.util.find_spec("erasediff_kernels._C") is None:
        return frozenset()
    for op, row in OPS.items():
        if not hasattr(getattr(torch.ops, NAMESPACE), op):  # a load that failed before leaves them behind
            torch.library.define(f"{NAMESPACE}::{op}", private_schema(row))
    try:
        importlib.import_module("erasediff_kernels._C")
    except ImportError as error:
        raise ImportError(
            f"the compiled extension erasediff_kernels._C is there but cannot be loaded with torch {torch.__version__} "
            f"({error}); {REBUILD}"
        ) from error
    served = set()
    for device, key in DISPATCH_KEYS.items():
        claimed = {op for op, row in OPS.items() if LANGUAGES[device] in row.implementations}
        present = {op for op in claimed if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)}
        if present and present != claimed:
            missing = ", ".join(sorted(claimed - present))
            raise ImportError(
                f"the compiled extension erasediff_kernels._C was built from other sources: it has no {missing} for "
                f"{device}; {REBUILD}"
            )
        if present:
            served.add(device)
    if not served:
        raise ImportError(
            f"the compiled extension erasediff_kernels._C was built from other sources: it has no operator; {REBUILD}"
        )
    return frozenset(served)


def implementation(op: str) -> Callable[..., Any]:
    """The compiled operator, for whichever device its tensors are on."""
    function: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), op).default
    return _on_checked_lists(op, function) if OPS[op].checks_lists else function


def _on_checked_lists(op: str, function: Callable[..., Any]) -> Callable[..., Tensor | None]:
    """`function` on lists that passed Python's checks: a refusal is a mistake of this package."""

    def run(*args: Any) -> Tensor | None:
        result = function(*args)
        if result is None or result is False:
            raise RuntimeError(f"{op}: csrc/lists.h refused lists that Python's checks let pass; please report it")
        return result if isinstance(result, Tensor) else None

    return run


DEVICES = _load()
FAST_PATH: dict[str, Callable[..., Any]] = (
    {op: getattr(getattr(torch.ops, NAMESPACE), op).default for op, row in OPS.items() if row.checks_lists}
    if DEVICES
    else {}
)
