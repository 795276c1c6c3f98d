"""The constrained step: barriers, the closed-form multiplier, and the loop's one object."""

from erasediff.solver.barrier import Barrier, Cosine, Fixed, Gap, Norm
from erasediff.solver.base import Solver, SolverOptions
from erasediff.solver.erasediff import EraseDiff
from erasediff.solver.inner import InnerSolve
from erasediff.solver.report import StepReport

__all__ = [
    "Barrier",
    "Cosine",
    "EraseDiff",
    "Fixed",
    "Gap",
    "InnerSolve",
    "Norm",
    "Solver",
    "SolverOptions",
    "StepReport",
]
