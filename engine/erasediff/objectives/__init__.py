"""What the two losses measure: retained data is denoised truly, forgotten data towards a deviated target."""

from erasediff.objectives.batch import Batch, Denoiser, diffusers_denoiser, with_sample_ids
from erasediff.objectives.denoising import Backward, DenoisingObjective
from erasediff.objectives.negative_guidance import NegativeGuidance
from erasediff.objectives.target import DeviationTarget, GaussianNoise, Relabel, UniformNoise
from erasediff.objectives.trajectory import Trajectories

__all__ = [
    "Backward",
    "Batch",
    "Denoiser",
    "DenoisingObjective",
    "DeviationTarget",
    "GaussianNoise",
    "NegativeGuidance",
    "Relabel",
    "Trajectories",
    "UniformNoise",
    "diffusers_denoiser",
    "with_sample_ids",
]
