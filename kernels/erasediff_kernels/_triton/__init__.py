"""Triton implementations, for CUDA and ROCm devices; with TRITON_INTERPRET=1, slowly, for the CPU as well."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from erasediff_kernels._dispatch import device_of
from erasediff_kernels._library import OPS
from erasediff_kernels._triton.language import INTERPRETED

DEVICES = frozenset({"cuda", "cpu"} if INTERPRETED else {"cuda"})


def implementation(op: str) -> Callable[..., Any]:
    """The function that launches an operator's kernels, on the device of its tensors."""
    launcher = getattr(importlib.import_module(f"{__name__}.{OPS[op].family}"), op)

    # Triton launches on the current device, which need not be that of the tensors.
    @functools.wraps(launcher)
    def run(*args: Any) -> Any:
        device = device_of(args)
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(*args)
        with torch.cuda.device(device):
            return launcher(*args)

    return run
