"""Judges by the names that a user gives: "clip:FOLDER", "onnx:FILE", "my_module:function"."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

import torch

import erasediff.verdict.judges
from erasediff.errors import UserError
from erasediff.verdict.judges.base import Judge

FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""A Python function by its module, as in "my_judge:shows"."""


@dataclass(frozen=True, slots=True)
class JudgeKind:
    """Kind of judge that is chosen by name. Each is ``KIND`` in a module of this package.

    Attributes:
        name: Name before the colon; "" for Python functions, which have none.
        usage: The whole, as in "clip:FOLDER".
        build: Function of what follows the colon ("" for nothing), and the device that a network runs on.
    """

    name: str
    usage: str
    build: Callable[[str, torch.device], Judge]


def judge_kinds() -> dict[str, JudgeKind]:
    """Kinds by name: each ``KIND`` of the modules of ``erasediff.verdict.judges``."""
    package = erasediff.verdict.judges
    modules = [import_module(f"{package.__name__}.{module.name}") for module in iter_modules(package.__path__)]
    kinds = [module.KIND for module in modules if isinstance(getattr(module, "KIND", None), JudgeKind)]
    return {kind.name: kind for kind in kinds}


def judge_named(reference: str, device: torch.device | str = "cpu") -> Judge:
    """Judge that ``reference`` names, such as "clip:FOLDER"; only local files are read.

    A Python function, "module:function", is imported: its module is run.

    Args:
        reference: Name of the kind, and what follows its colon.
        device: Device that a network runs on.

    Raises:
        UserError: There is no such kind, or its files cannot be read.
    """
    kinds = judge_kinds()
    name, colon, argument = reference.partition(":")
    if name and name in kinds:
        return kinds[name].build(argument, torch.device(device))
    if colon and FUNCTION.fullmatch(reference):
        return kinds[""].build(reference, torch.device(device))
    usages = ", ".join(kind.usage for kind in kinds.values())
    raise UserError(f'There is no judge "{reference}": give one of {usages}.')
