"""The compiled backend: the C++ and CUDA operators of `csrc/`, through the stable ABI.

An installation without the extension `_C` is supported: this backend then serves no device. An extension that is there
but cannot be loaded is an error, since silently running something slower would hide it.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _load() -> frozenset[str]:
    """Import `_C` where there is one; the device types that it has kernels for."""
    if importlib.util.find_spec("erasediff_kernels._C") is None:
        return frozenset()
    try:
        importlib.import_module("erasediff_kernels._C")
    except ImportError as error:
        raise ImportError(
            f"the compiled extension erasediff_kernels._C is there but cannot be loaded with torch {torch.__version__} "
            f"({error}); build it again with `pip install --no-build-isolation -e .`, or delete it to run without"
        ) from error
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    return frozenset(device for device, key in keys.items() if has_kernel("erasediff_C::gradient_gram", key))


def _accepted(op: str) -> Callable[..., Tensor | None]:
    """`op` on lists that Python's checks let pass: that they are not accepted is a mistake of this package."""

    def run(*args: Any) -> Tensor | None:
        result = ACCEPTING[op](*args)
        if result is None or result is False:
            raise RuntimeError(f"{op}: csrc/lists.h refused lists that Python's checks let pass; please report it")
        return result if isinstance(result, Tensor) else None

    return run


DEVICES = _load()

if DEVICES:
    # Schemas in csrc/library.cpp, the same as in `_library`, but that operators on lists first look at their lists.
    _ops = torch.ops.erasediff_C
    ACCEPTING = {op: getattr(_ops, op).default for op in ("gradient_gram", "constrained_adamw_", "constrained_sgd_")}
    philox_bits = _ops.philox_bits.default
    philox_noise = _ops.philox_noise.default
    add_noise = _ops.add_noise.default
    denoising_loss = _ops.denoising_loss.default
    deviation_loss = _ops.deviation_loss.default
    constraint_multiplier = _ops.constraint_multiplier.default
    topk_encode = _ops.topk_encode.default
    sparse_decode = _ops.sparse_decode.default
    gather_dot = _ops.gather_dot.default
    scatter_outer = _ops.scatter_outer.default
    gradient_gram = _accepted("gradient_gram")
    constrained_adamw_ = _accepted("constrained_adamw_")
    constrained_sgd_ = _accepted("constrained_sgd_")
