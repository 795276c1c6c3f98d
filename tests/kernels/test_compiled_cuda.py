"""The CUDA sources, compiled as C++ with the emulator and put through all tests of the operators on the CPU.

It shows that what each thread reads, computes and writes is right. Registers and instructions are the matter of
`make kernels-aot`; speed needs a GPU.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import erasediff_kernels

ROOT = Path(__file__).resolve().parents[2]
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def emulator() -> ModuleType:
    """The module `emulator/build_emulated.py`."""
    spec = importlib.util.spec_from_file_location("build_emulated", TESTS / "emulator/build_emulated.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.COMPILER is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler, on Linux")
    return module


@pytest.mark.timeout(900)
def test_cuda_sources_pass_the_operator_tests(emulator: ModuleType, tmp_path: Path) -> None:
    package = Path(erasediff_kernels.__file__).parent
    ignored = shutil.ignore_patterns("_C*.so", "__pycache__")
    shutil.copytree(package, tmp_path / "kernels" / "erasediff_kernels", ignore=ignored)
    shutil.copy(emulator.build(), tmp_path / "kernels" / "erasediff_kernels" / "_C.abi3.so")
    tests = [path for path in TESTS.glob("test_*.py") if not path.name.startswith(("test_compiled", "test_build"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--durations=40", "-k", "compiled", *map(str, tests)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "kernels")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout


@pytest.fixture
def compilations(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The suffix of each file that is compiled or linked from here on."""
    made: list[str] = []
    run = subprocess.run

    def counted(command: list[str], **options: object) -> object:
        if "-o" in command:
            made.append("library" if "-shared" in command else Path(command[command.index("-c") + 1]).name)
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(emulator.subprocess, "run", counted)
    return made


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc"
    (folder / "cuda").mkdir(parents=True)
    (folder / "value.h").write_text("#define VALUE 1\n")
    (folder / "one.cpp").write_text('#include "value.h"\nint one() { return VALUE; }\n')
    (folder / "cuda/two.cu").write_text("int two() { return 2; }\n")
    return folder


def test_what_did_not_change_is_not_compiled_again(
    emulator: ModuleType, compilations: list[str], sources: Path, tmp_path: Path
) -> None:
    first = emulator.build(sources, tmp_path / "cache")
    assert sorted(compilations) == ["library", "one.cpp", "two.cu"]
    compilations.clear()
    assert emulator.build(sources, tmp_path / "cache") == first
    assert compilations == []
    (sources / "value.h").write_text("#define VALUE 3\n")
    assert emulator.build(sources, tmp_path / "cache") != first
    assert compilations == ["one.cpp", "library"]


@pytest.mark.parametrize("suffix", [".o", ".so"])
def test_a_damaged_file_of_the_cache_is_not_used(
    emulator: ModuleType, compilations: list[str], sources: Path, tmp_path: Path, suffix: str
) -> None:
    library = emulator.build(sources, tmp_path / "cache")
    expected = library.read_bytes()
    for path in (tmp_path / "cache").glob(f"*{suffix}"):
        path.write_bytes(path.read_bytes()[:-1])
    compilations.clear()
    emulator.build(sources, tmp_path / "cache")
    assert sorted(compilations) == (["library"] if suffix == ".so" else ["one.cpp", "two.cu"])
    assert library.read_bytes() == expected
    assert not list((tmp_path / "cache").glob("*.partial"))
