"""Triton implementations, for CUDA and ROCm devices; with TRITON_INTERPRET=1, slowly, for the CPU as well."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from erasediff_kernels._dispatch import device_of
from erasediff_kernels._triton import constraint, losses, noise, sparse, topk, update
from erasediff_kernels._triton.language import INTERPRETED

DEVICES = frozenset({"cuda", "cpu"} if INTERPRETED else {"cuda"})


def on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(launcher)
    def run(*args: Any) -> Any:
        device = device_of(args)
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(*args)
        with torch.cuda.device(device):
            return launcher(*args)

    return run


philox_bits = on_its_device(noise.philox_bits)
philox_noise = on_its_device(noise.philox_noise)
add_noise = on_its_device(noise.add_noise)
denoising_loss = on_its_device(losses.denoising_loss)
deviation_loss = on_its_device(losses.deviation_loss)
gradient_gram = on_its_device(constraint.gradient_gram)
constraint_multiplier = on_its_device(constraint.constraint_multiplier)
constrained_adamw_ = on_its_device(update.constrained_adamw_)
constrained_sgd_ = on_its_device(update.constrained_sgd_)
topk_encode = on_its_device(topk.topk_encode)
sparse_decode = on_its_device(sparse.sparse_decode)
gather_dot = on_its_device(sparse.gather_dot)
scatter_outer = on_its_device(sparse.scatter_outer)

__all__ = [
    "DEVICES",
    "add_noise",
    "constrained_adamw_",
    "constrained_sgd_",
    "constraint_multiplier",
    "denoising_loss",
    "deviation_loss",
    "gather_dot",
    "gradient_gram",
    "philox_bits",
    "philox_noise",
    "scatter_outer",
    "sparse_decode",
    "topk_encode",
]
