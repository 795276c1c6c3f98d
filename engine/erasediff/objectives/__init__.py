"""What the two losses measure: retained data is denoised truly, forgotten data towards a deviated target."""

from erasediff.objectives.batch import Batch, Denoiser, diffusers_denoiser
from erasediff.objectives.denoising import Backward, DenoisingObjective
from erasediff.objectives.target import DeviationTarget, GaussianNoise, Relabel, UniformNoise

__all__ = [
    "Backward",
    "Batch",
    "Denoiser",
    "DenoisingObjective",
    "DeviationTarget",
    "GaussianNoise",
    "Relabel",
    "UniformNoise",
    "diffusers_denoiser",
]
