"""Index of the unlearning methods and barriers, read from their sources without importing torch."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

METHODS_PACKAGE = "erasediff.methods"
METHODS_FOLDER = Path(__file__).parents[1] / "methods"
BARRIERS_FOLDER = METHODS_FOLDER / "barriers"


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """Literals of a method's ``MethodSpec``; ``section`` is the name of its settings, if it has any."""

    name: str
    summary: str
    section: str | None


@functools.cache
def method_index() -> dict[str, MethodEntry]:
    """Index of all methods by name, in alphabetical order: all top-level ``MethodSpec(...)`` in the package's files.

    The command line needs names and summaries for ``--help``, and names to check a configuration, long before it needs
    the methods themselves. ``ValueError`` for a name or summary that is not a literal.
    """
    entries = [entry for file in sorted(METHODS_FOLDER.glob("*.py")) for entry in _entries(file)]
    return {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}


@functools.cache
def barrier_names() -> tuple[str, ...]:
    """Names of all barriers, in alphabetical order: the files of ``erasediff.methods.barriers``."""
    return tuple(sorted(file.stem for file in BARRIERS_FOLDER.glob("*.py") if file.stem not in ("__init__", "base")))


def section_name(method: str) -> str:
    """Key of a method's settings in a configuration."""
    return method.replace("-", "_")


def import_methods() -> None:
    """Import every method, which registers their settings with ``Config``. Imports torch."""
    import_module(METHODS_PACKAGE)


def _entries(file: Path) -> list[MethodEntry]:
    source = file.read_text(encoding="utf-8")
    if "MethodSpec(" not in source:
        return []
    calls = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    return [
        _entry(call, file)
        for call in calls
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "MethodSpec"
    ]


def _entry(call: ast.Call, file: Path) -> MethodEntry:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    name, summary = (_literal(keywords.get(key), f"{key} of the MethodSpec in {file}") for key in ("name", "summary"))
    return MethodEntry(name, summary, section_name(name) if "config" in keywords else None)


def _literal(node: ast.expr | None, described: str) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise ValueError(f"the {described} must be a string literal: it is read without importing the file")
    return node.value
