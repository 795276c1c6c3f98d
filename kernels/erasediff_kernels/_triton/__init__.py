"""Triton implementations, for CUDA and ROCm devices; with TRITON_INTERPRET=1, slowly, for the CPU as well."""

from erasediff_kernels._triton.constraint import constraint_multiplier, gradient_gram
from erasediff_kernels._triton.language import INTERPRETED
from erasediff_kernels._triton.losses import denoising_loss, deviation_loss
from erasediff_kernels._triton.noise import add_noise, philox_bits, philox_noise
from erasediff_kernels._triton.update import constrained_adamw_, constrained_sgd_

DEVICES = frozenset({"cuda", "cpu"} if INTERPRETED else {"cuda"})

__all__ = [
    "DEVICES",
    "add_noise",
    "constrained_adamw_",
    "constrained_sgd_",
    "constraint_multiplier",
    "denoising_loss",
    "deviation_loss",
    "gradient_gram",
    "philox_bits",
    "philox_noise",
]
