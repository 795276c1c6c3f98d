"""Completeness of the operators: every row of `OPS` has all the parts that CONTRIBUTING lists for a new operator."""

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

import erasediff_kernels
from erasediff_kernels._library import OPS, Operator

ROOT = Path(__file__).resolve().parents[2]
TESTS = Path(__file__).parent


def missing_parts(operators: Mapping[str, Operator]) -> Iterator[str]:
    """Parts that rows claim and the source tree does not have, one sentence each."""
    tests = {path.name: path.read_text() for path in TESTS.glob("test_*.py")}
    public = {name for name in erasediff_kernels.__all__ if inspect.isfunction(getattr(erasediff_kernels, name))}
    for op, row in operators.items():
        arguments = [argument.name for argument in torch._C.parse_schema(f"erasediff::{op}{row.schema}").arguments]
        if op not in public or not has_function(f"erasediff_kernels.ops.{row.file}", op):
            yield f"{op}: no public function in ops/{row.file}.py that erasediff_kernels exports"
        if not has_function(f"erasediff_kernels.reference.{row.family}", op, arguments):
            yield f"{op}: no function with the arguments of its schema in reference/{row.family}.py"
        if not any(f"torch.ops.erasediff.{op}.default" in text for text in tests.values()):
            yield f"{op}: no test calls torch.library.opcheck on it"
        if "C++" in row.implementations and not is_registered(op, ROOT / "csrc/cpu" / f"{row.file}.cpp"):
            yield f"{op}: csrc/cpu/{row.file}.cpp does not register it"
        if "CUDA" in row.implementations and not is_registered(op, ROOT / "csrc/cuda" / f"{row.file}.cu"):
            yield f"{op}: csrc/cuda/{row.file}.cu does not register it"
        if "Triton" not in row.implementations or importlib.util.find_spec("triton") is None:
            continue
        if not has_function(f"erasediff_kernels._triton.{row.family}", op, arguments):
            yield f"{op}: no function with the arguments of its schema in _triton/{row.family}.py"
        cases = importlib.import_module("aot_cases").triton_cases()
        if not any(case.name.split()[0] == op for case in cases):
            yield f"{op}: no case in tools/aot_cases.py"


def has_function(module: str, name: str, arguments: list[str] | None = None) -> bool:
    if importlib.util.find_spec(module) is None:
        return False
    function = getattr(importlib.import_module(module), name, None)
    if function is None or (not function.__doc__ and arguments is None):
        return False
    return arguments is None or list(inspect.signature(function).parameters) == arguments


def is_registered(op: str, source: Path) -> bool:
    return source.is_file() and f'm.impl("{op}"' in source.read_text()


def test_every_operator_is_complete() -> None:
    assert list(missing_parts(OPS)) == []


def test_every_missing_part_is_found() -> None:
    """A row without any file, and one that claims Triton and CUDA only by its name."""
    row = Operator(schema="(Tensor x) -> Tensor", fake=torch.empty_like, file="cube", family="cubes")
    found = list(missing_parts({"cube": row}))
    for part in ("ops/cube.py", "reference/cubes.py", "opcheck", "cpu/cube.cpp", "cuda/cube.cu"):
        assert any(part in sentence for sentence in found), part
    if importlib.util.find_spec("triton") is not None:
        assert any("_triton/cubes.py" in sentence for sentence in found)
        assert any("aot_cases" in sentence for sentence in found)


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_nothing_is_registered_that_the_table_does_not_have(folder: str) -> None:
    language = {"cpu": "C++", "cuda": "CUDA"}[folder]
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / folder).iterdir())
    registered = set(re.findall(r'm\.impl\("(\w+)"', sources))
    assert registered == {op for op, row in OPS.items() if language in row.implementations}
