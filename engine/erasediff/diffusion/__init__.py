"""Diffusion processes and their losses: noise schedules, addressed noise, denoising and forget losses, trajectories."""

from erasediff.diffusion.batch import Batch, Denoiser, diffusers_denoiser, micro_batches, with_sample_ids
from erasediff.diffusion.losses import DenoisingObjective, MicroBatchLoss
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole, draw_timesteps, noise_key
from erasediff.diffusion.targets import (
    DeviationTarget,
    GaussianNoise,
    LossContext,
    NegativeGuidance,
    Relabel,
    UniformNoise,
)
from erasediff.diffusion.trajectories import Trajectories
from erasediff_kernels.ops.denoising_loss import PREDICTION_TYPES

__all__ = [
    "PREDICTION_TYPES",
    "Batch",
    "Denoiser",
    "DenoisingObjective",
    "DeviationTarget",
    "GaussianNoise",
    "LossContext",
    "MicroBatchLoss",
    "NegativeGuidance",
    "NoiseRole",
    "Process",
    "Relabel",
    "Trajectories",
    "UniformNoise",
    "diffusers_denoiser",
    "draw_timesteps",
    "micro_batches",
    "noise_key",
    "with_sample_ids",
]
