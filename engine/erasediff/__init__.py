"""Unlearning for diffusion models: remove chosen data or concepts, keep everything else.

>>> from erasediff import EraseDiff, Norm, Process, UniformNoise
>>> unlearner = EraseDiff(model, optimizer, process=Process.from_scheduler(scheduler), barrier=Norm(eta=0.1))
>>> report = unlearner.step(retain_batch, forget_batch)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from erasediff.diffusion.noise_schedule import Process
    from erasediff.diffusion.targets import GaussianNoise, Relabel, UniformNoise
    from erasediff.methods.barriers import Conflict, Cosine, Fixed, Gap, Nash, Norm, Threshold
    from erasediff.methods.base import StepReport
    from erasediff.methods.erasediff import EraseDiff
    from erasediff.methods.inner_solve import InnerSolve

__all__ = [
    "Conflict",
    "Cosine",
    "EraseDiff",
    "Fixed",
    "Gap",
    "GaussianNoise",
    "InnerSolve",
    "Nash",
    "Norm",
    "Process",
    "Relabel",
    "StepReport",
    "Threshold",
    "UniformNoise",
]

_DIFFUSION = {"GaussianNoise", "Process", "Relabel", "UniformNoise"}


def __getattr__(name: str) -> object:
    # Looked up when first used, so that the command line answers --help without waiting for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{'diffusion' if name in _DIFFUSION else 'methods'}"), name)
    globals()[name] = value
    return value
