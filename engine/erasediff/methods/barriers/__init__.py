"""Barriers by name: every module of this package but ``base`` holds one rule, a ``Barrier`` called like its file."""

from importlib import import_module
from pkgutil import iter_modules

from erasediff.methods.barriers.base import Barrier, StepValues
from erasediff.methods.barriers.conflict import Conflict
from erasediff.methods.barriers.cosine import Cosine
from erasediff.methods.barriers.fixed import Fixed
from erasediff.methods.barriers.gap import Gap
from erasediff.methods.barriers.nash import Nash
from erasediff.methods.barriers.norm import Norm
from erasediff.methods.barriers.threshold import Threshold


def _rule_of(module: str) -> type[Barrier]:
    """The barrier that the module is called for."""
    for value in vars(import_module(f"{__name__}.{module}")).values():
        if isinstance(value, type) and issubclass(value, Barrier) and getattr(value, "name", None) == module:
            return value
    raise ValueError(f"{__name__}.{module} holds no Barrier with the name {module!r}")


BARRIERS: dict[str, type[Barrier]] = {
    module.name: _rule_of(module.name) for module in iter_modules(__path__) if module.name != "base"
}
"""The rules by their names; a new file is listed without a change here."""

__all__ = [
    "BARRIERS",
    "Barrier",
    "Conflict",
    "Cosine",
    "Fixed",
    "Gap",
    "Nash",
    "Norm",
    "StepValues",
    "Threshold",
]
