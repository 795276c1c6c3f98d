"""The choices of setup.py, made in processes of their own; nothing is compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def configure(
    environment: dict[str, str], *, isolated: bool = False, code: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run setup.py far enough to print what it would build. `isolated`: without torch, as in pip's build isolation."""
    script = f"""
import os, runpy, setuptools, sys
if {isolated}:
    sys.modules["torch"] = None
{code}
setuptools.setup = lambda **arguments: print("extensions:", [e.name for e in arguments.get("ext_modules", [])])
runpy.run_path("setup.py", run_name="__main__")
"""
    chosen = ("ERASEDIFF", "CUDA", "TORCH_CUDA")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False
    )


def test_unknown_choice() -> None:
    result = configure({"ERASEDIFF_BUILD": "fast"})
    assert result.returncode != 0
    assert "choose one of none, cpu, cuda, auto" in result.stderr


def test_unknown_debug() -> None:
    result = configure({"ERASEDIFF_BUILD": "cpu", "ERASEDIFF_DEBUG": "yes"})
    assert result.returncode != 0
    assert "ERASEDIFF_DEBUG='yes': choose 0 or 1" in result.stderr


def test_none() -> None:
    result = configure({"ERASEDIFF_BUILD": "none"})
    assert "extensions: []" in result.stdout


def test_isolated_auto_builds_nothing_and_says_how_to() -> None:
    result = configure({}, isolated=True)
    assert "extensions: []" in result.stdout
    assert "pip install --no-build-isolation" in result.stderr


@pytest.mark.parametrize("choice", ["cpu", "cuda"])
def test_explicit_choice_without_torch_is_an_error(choice: str) -> None:
    result = configure({"ERASEDIFF_BUILD": choice}, isolated=True)
    assert result.returncode != 0
    assert f"ERASEDIFF_BUILD={choice} cannot be built" in result.stderr


def test_cpu_without_compiler_is_an_error() -> None:
    no_compiler = "import shutil; shutil.which = lambda *a, **k: None"
    result = configure({"ERASEDIFF_BUILD": "cpu"}, code=no_compiler)
    assert result.returncode != 0
    assert "no C++ compiler" in result.stderr
    assert "extensions: []" in configure({}, code=no_compiler).stdout


def test_cuda_without_nvcc_is_an_error_and_auto_builds_for_the_cpu(tmp_path: Path) -> None:
    environment = {"CUDA_HOME": str(tmp_path)}
    result = configure(environment | {"ERASEDIFF_BUILD": "cuda"})
    assert result.returncode != 0
    assert "cannot be built" in result.stderr
    result = configure(environment)
    assert "extensions: ['erasediff_kernels._C']" in result.stdout
    assert "not the CUDA ones" in result.stderr
