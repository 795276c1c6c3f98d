"""Fused operators for unlearning in diffusion models. Needs torch only.

Every operator has an eager reference and, where built or available, compiled (C++, CUDA) and Triton implementations;
`python -m erasediff_kernels.info` lists which would run here, `use_backend` forces one.
"""

# First: it defines torch.ops.erasediff, on which the modules of ops register autograd.
from erasediff_kernels._dispatch import available_backends, backend_for, use_backend
from erasediff_kernels.ops.add_noise import add_noise
from erasediff_kernels.ops.clip_combination import clip_combination
from erasediff_kernels.ops.constrained_adamw import constrained_adamw_
from erasediff_kernels.ops.constrained_sgd import constrained_sgd_
from erasediff_kernels.ops.constraint_multiplier import Constraint, constraint_multiplier
from erasediff_kernels.ops.denoising_loss import DenoisingLoss, denoising_loss
from erasediff_kernels.ops.deviation_loss import DeviationLoss, deviation_loss
from erasediff_kernels.ops.gather_dot import gather_dot
from erasediff_kernels.ops.gradient_gram import gradient_gram
from erasediff_kernels.ops.masks import pack_mask, unpack_mask
from erasediff_kernels.ops.philox import philox_bits, philox_noise
from erasediff_kernels.ops.scatter_outer import scatter_outer
from erasediff_kernels.ops.sparse_decode import sparse_decode
from erasediff_kernels.ops.topk_encode import SparseCode, topk_encode
from erasediff_kernels.optim import ConstrainedAdamW, ConstrainedSGD

__all__ = [
    "ConstrainedAdamW",
    "ConstrainedSGD",
    "Constraint",
    "DenoisingLoss",
    "DeviationLoss",
    "SparseCode",
    "add_noise",
    "available_backends",
    "backend_for",
    "clip_combination",
    "constrained_adamw_",
    "constrained_sgd_",
    "constraint_multiplier",
    "denoising_loss",
    "deviation_loss",
    "gather_dot",
    "gradient_gram",
    "pack_mask",
    "philox_bits",
    "philox_noise",
    "scatter_outer",
    "sparse_decode",
    "topk_encode",
    "unpack_mask",
    "use_backend",
]
