"""Eager reference of every operator: torch only, fp32 or fp64 inside, the truth the other implementations answer to."""

from erasediff_kernels.reference.constraint import constraint_multiplier, gradient_gram
from erasediff_kernels.reference.losses import denoising_loss, deviation_loss
from erasediff_kernels.reference.noise import add_noise, philox_bits, philox_noise
from erasediff_kernels.reference.sparse import gather_dot, scatter_outer, sparse_decode, topk_encode
from erasediff_kernels.reference.update import constrained_adamw_, constrained_sgd_

DEVICES = frozenset({"cpu", "cuda"})

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
