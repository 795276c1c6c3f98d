"""Unlearning for diffusion models: remove chosen data or concepts, keep everything else.

>>> from erasediff import EraseDiff, Norm, Process, UniformNoise
>>> unlearner = EraseDiff(model, optimizer, process=Process.from_scheduler(scheduler), barrier=Norm(eta=0.1))
>>> report = unlearner.step(retain_batch, forget_batch)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_HOMES = {"GaussianNoise": "objectives", "Relabel": "objectives", "UniformNoise": "objectives", "Process": "process"}


def __getattr__(name: str) -> object:
    # Looked up when first used, so that the command line answers --help without waiting for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'solver')}"), name)
    globals()[name] = value
    return value
