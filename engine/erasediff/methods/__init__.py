"""Every way to unlearn, and the baselines it is compared with, behind one protocol."""

from erasediff.methods import erasediff, esd, finetune, neggrad, pruning, retrain, salun, selective_amnesia
from erasediff.methods.esd import ESD
from erasediff.methods.finetune import FineTune
from erasediff.methods.neggrad import NegativeGradient
from erasediff.methods.protocol import Materials, Method, Needs, Recipe
from erasediff.methods.pruning import PrunedEraseDiff, PrunedESD
from erasediff.methods.retrain import Retrain
from erasediff.methods.salun import SalUn
from erasediff.methods.selective_amnesia import SelectiveAmnesia
from erasediff.solver import EraseDiff

RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE
    for module in (erasediff, esd, pruning, salun, selective_amnesia, retrain, finetune, neggrad)
}

__all__ = [
    "ESD",
    "RECIPES",
    "EraseDiff",
    "FineTune",
    "Materials",
    "Method",
    "Needs",
    "NegativeGradient",
    "PrunedESD",
    "PrunedEraseDiff",
    "Recipe",
    "Retrain",
    "SalUn",
    "SelectiveAmnesia",
]
