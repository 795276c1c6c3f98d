"""The table of DeepSpeed's undocumented names: complete, true of the installed version, and covered by tests."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import erasediff.parallel.zero
from erasediff.parallel.zero.private_names import PRIVATE_NAMES

OURS = Path(erasediff.parallel.zero.__file__).parent
TESTS = Path(__file__).parents[3] / "distributed"
DOCUMENTED = {
    "DeepSpeedEngine",
    "GatheredParameters",
    "Init",
    "mem_efficient_linear",
    "module",
    "optimizer",
    "zero_optimization",
    "scale_wrt_gas",
    "enabled",
    "set_gradient_accumulation_boundary",
    "is_gradient_accumulation_boundary",
    "managed_gradient_accumulation",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_micro_batch_size_per_gpu",
    "offload_optimizer",
    "offload_param",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
ELSEWHERE = {"linear", "param", "params", "recurse", "buffer", "_parameters", "param_groups", "state"}
"""Names of torch's or of this package that DeepSpeed has too."""


def defined(path: Path) -> set[str]:
    """Functions, classes, attributes and fields that a module of DeepSpeed defines."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def used(path: Path) -> set[str]:
    """Attributes of others, keywords, names in strings and imports from DeepSpeed in a module of this package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            names.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            names.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names.add(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed"):
            names |= {alias.name for alias in node.names}
    return names


def unmangled(name: str) -> str:
    return re.sub(r"^_[A-Z]\w*?__", "__", name)


@pytest.fixture(scope="module")
def deepspeed_names() -> dict[str, set[str]]:
    spec = find_spec("deepspeed")
    if spec is None or spec.origin is None:
        pytest.skip("DeepSpeed is not installed")
    root = Path(spec.origin).parent
    return {file: defined(root / file) for file in {entry.defined_in for entry in PRIVATE_NAMES}}


def test_every_name_is_in_the_installed_deepspeed(deepspeed_names: dict[str, set[str]]) -> None:
    gone = [
        f"{entry.defined_in}: {entry.name}"
        for entry in PRIVATE_NAMES
        if not {entry.name, unmangled(entry.name)} & deepspeed_names[entry.defined_in]
    ]
    assert not gone


def test_every_undocumented_name_in_the_package_is_in_the_table(deepspeed_names: dict[str, set[str]]) -> None:
    types = (torch.Tensor, torch.nn.Parameter, torch.nn.Module, torch.optim.Optimizer, torch.device, torch, dict, list)
    general = {name for kind in (*types, set, str) for name in dir(kind)} | DOCUMENTED | ELSEWHERE
    theirs = set().union(*deepspeed_names.values()) - general
    for path in sorted(OURS.glob("*.py")):
        if path.stem == "private_names":
            continue
        table = {entry.name for entry in PRIVATE_NAMES if path.stem in entry.used_in.split()}
        private = {name for name in used(path) if unmangled(name) in theirs}
        assert private == table, path.name


def test_every_name_is_covered_by_a_test_that_exists() -> None:
    for test in {entry.test for entry in PRIVATE_NAMES}:
        file, _, function = test.partition("::")
        assert f"def {function}(" in (TESTS / file).read_text(), test
