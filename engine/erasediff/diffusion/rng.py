"""Addressed randomness: every draw is a function of (seed, step, role, sample id), never of what was drawn before.

A run therefore sees the same noise and timesteps whatever the world size, micro-batching or number of restarts.
The generator is Philox4x32-10 (Salmon et al. 2011) in ``erasediff_kernels``.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from erasediff_kernels import philox_bits


class NoiseRole(IntEnum):
    """Purposes of draws. The number is part of the Philox counter: changing one changes every run."""

    RETAIN_NOISE = 0
    FORGET_NOISE = 1
    FORGET_TARGET = 2
    RETAIN_TIMESTEP = 3
    FORGET_TIMESTEP = 4
    RELABEL = 5
    LABEL_DROPOUT = 6
    SAMPLING = 7
    TRAJECTORY = 8
    FISHER_NOISE = 9
    FISHER_TIMESTEP = 10
    SURROGATE = 11
    MEMBERSHIP = 12
    ANCHOR = 13
    DRIFT = 14
    CLASSIFIER = 15
    DISTANCE = 16
    QUICK_LOOK = 17
    ORDER = 64
    BUCKET_ORDER = 65
    FLIP = 66
    SYNTHESIS_SEED = 67
    ROUNDING = 255


def noise_key(seed: int, step: int, device: torch.device | str) -> Tensor:
    """The part of the Philox address that a whole step shares: int64 [2] = (seed, step) on ``device``."""
    # Filled on the device: copying a host tensor there would wait for the device.
    return torch.stack([torch.full((), value, dtype=torch.int64, device=device) for value in (seed, step)])


def draw_timesteps(
    sample_ids: Tensor, key: Tensor, role: NoiseRole, num_train_timesteps: int, *, antithetic: bool = False
) -> Tensor:
    """Draw uniform train timesteps.

    Args:
        sample_ids: int64 [B], slots in the global batch.
        key: int64 [2] of ``noise_key``.
        role: of the draw.
        num_train_timesteps: T.
        antithetic: the samples 2i and 2i+1 share one draw, t and T-1-t: the mean loss over a batch then varies less
            from step to step, and each sample's own timestep is still uniform.

    Returns:
        int64 [B] in [0, T).
    """
    word = philox_bits(sample_ids // 2 if antithetic else sample_ids, key, int(role), 1)[:, 0]
    timesteps = (word * num_train_timesteps) >> 32
    if antithetic:
        timesteps = torch.where(sample_ids % 2 == 1, num_train_timesteps - 1 - timesteps, timesteps)
    return timesteps
