"""Every way to unlearn, and the baselines it is compared with, behind one protocol."""

from collections.abc import Callable

from erasediff.methods.finetune import FineTune
from erasediff.methods.neggrad import NegativeGradient
from erasediff.methods.protocol import Method
from erasediff.solver import EraseDiff

METHODS: dict[str, Callable[..., Method]] = {method.name: method for method in (EraseDiff, FineTune, NegativeGradient)}

__all__ = ["METHODS", "EraseDiff", "FineTune", "Method", "NegativeGradient"]
