"""The CUDA sources, compiled as C++ with the emulator and put through all tests of the operators on the CPU.

It shows that what each thread reads, computes and writes is right. Registers and instructions are the matter of
`tools/aot_cuda.py`; speed needs a GPU.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
TESTS = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = ["-x", "c++", "-std=c++20", "-O1", "-w", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030b0000"]


def build(folder: Path) -> Path:
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{TESTS / 'emulator'}", f"-isystem{torch_folder / 'include'}", f"-I{sysconfig.get_path('include')}"]
    sources = [*SOURCES.glob("*.cpp"), *(SOURCES / "cuda").glob("*.cu")]
    objects = [folder / f"{source.stem}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        subprocess.run([COMPILER, *FLAGS, *DEFINES, *includes, "-c", source, "-o", target], check=True)
    library = folder / "_C.abi3.so"
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([COMPILER, "-shared", "-o", library, *objects, *libraries], check=True)
    return library


@pytest.mark.timeout(900)
@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler, on Linux")
def test_cuda_sources_pass_the_operator_tests(tmp_path: Path) -> None:
    import erasediff_kernels

    package = Path(erasediff_kernels.__file__).parent
    ignored = shutil.ignore_patterns("_C*.so", "__pycache__")
    shutil.copytree(package, tmp_path / "kernels" / "erasediff_kernels", ignore=ignored)
    shutil.copy(build(tmp_path), tmp_path / "kernels" / "erasediff_kernels")
    tests = [path for path in TESTS.glob("test_*.py") if not path.name.startswith(("test_compiled", "test_build"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "compiled", *map(str, tests)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "kernels")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout
