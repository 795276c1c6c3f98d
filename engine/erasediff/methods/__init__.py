"""Unlearning methods and baselines behind one protocol: solvers, barriers, and the recipes that build them."""

from erasediff.methods import baselines, erasediff, esd, pruning, salun, selective_amnesia
from erasediff.methods.barriers import Barrier, Cosine, Fixed, Gap, Norm
from erasediff.methods.base import Solver, SolverOptions, StepReport
from erasediff.methods.baselines import FineTune, NegativeGradient, Retrain
from erasediff.methods.erasediff import EraseDiff
from erasediff.methods.esd import ESD
from erasediff.methods.inner_solve import InnerSolve
from erasediff.methods.pruning import PrunedEraseDiff, PrunedESD
from erasediff.methods.salun import SalUn
from erasediff.methods.selective_amnesia import SelectiveAmnesia
from erasediff.methods.spec import BuildContext, Method, MethodSpec, Requirements

METHOD_SPECS: dict[str, MethodSpec] = {
    recipe.name: recipe
    for recipe in (
        erasediff.SPEC,
        esd.SPEC,
        pruning.SPEC,
        salun.SPEC,
        selective_amnesia.SPEC,
        baselines.RETRAIN,
        baselines.FINETUNE,
        baselines.NEGGRAD,
    )
}

__all__ = [
    "ESD",
    "METHOD_SPECS",
    "Barrier",
    "BuildContext",
    "Cosine",
    "EraseDiff",
    "FineTune",
    "Fixed",
    "Gap",
    "InnerSolve",
    "Method",
    "MethodSpec",
    "NegativeGradient",
    "Norm",
    "PrunedESD",
    "PrunedEraseDiff",
    "Requirements",
    "Retrain",
    "SalUn",
    "SelectiveAmnesia",
    "Solver",
    "SolverOptions",
    "StepReport",
]
