"""Unlearning for diffusion models: remove chosen data or concepts, keep everything else.

>>> from erasediff import EraseDiff, Norm, Process, UniformNoise
>>> unlearner = EraseDiff(model, optimizer, process=Process.from_scheduler(scheduler), barrier=Norm(eta=0.1))
>>> report = unlearner.step(retain_batch, forget_batch)
"""

from erasediff.objectives import GaussianNoise, Relabel, UniformNoise
from erasediff.process import Process
from erasediff.solver import Cosine, EraseDiff, Fixed, Gap, InnerSolve, Norm, StepReport

__all__ = [
    "Cosine",
    "EraseDiff",
    "Fixed",
    "Gap",
    "GaussianNoise",
    "InnerSolve",
    "Norm",
    "Process",
    "Relabel",
    "StepReport",
    "UniformNoise",
]
