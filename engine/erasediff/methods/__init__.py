"""Unlearning methods and baselines behind one protocol, and their registry: a file here is a method."""

import pkgutil
from importlib import import_module

from erasediff.config.schema import register_sections
from erasediff.methods.barriers import Barrier, Conflict, Cosine, Fixed, Gap, Nash, Norm, Threshold
from erasediff.methods.base import Solver, SolverOptions, StepReport
from erasediff.methods.baselines import FineTune, NegativeGradient, Retrain
from erasediff.methods.erasediff import EraseDiff
from erasediff.methods.esd import ESD
from erasediff.methods.inner_solve import InnerSolve
from erasediff.methods.pruning import PrunedEraseDiff, PrunedESD
from erasediff.methods.salun import SalUn
from erasediff.methods.selective_amnesia import SelectiveAmnesia
from erasediff.methods.spec import BuildContext, MethodSpec, Requirements


def _discover() -> dict[str, MethodSpec]:
    """Every ``MethodSpec`` at the top level of this package's modules, by its method's name."""
    specs: dict[str, MethodSpec] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        for value in vars(import_module(f"{__name__}.{module}")).values():
            if isinstance(value, MethodSpec) and specs.setdefault(value.name, value) is not value:
                raise ValueError(f"two methods are called {value.name}")
    return specs


METHOD_SPECS = _discover()
register_sections({spec.section: spec.config for spec in METHOD_SPECS.values() if spec.config is not None})

__all__ = [
    "ESD",
    "METHOD_SPECS",
    "Barrier",
    "BuildContext",
    "Conflict",
    "Cosine",
    "EraseDiff",
    "FineTune",
    "Fixed",
    "Gap",
    "InnerSolve",
    "MethodSpec",
    "Nash",
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
    "Threshold",
]
