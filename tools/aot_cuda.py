"""Compile and link the CUDA extension for sm_80, sm_90 and sm_100, and check what the compiler made of it.

`python tools/aot_cuda.py`; no GPU is needed. A kernel fails that spills registers, uses local memory or a stack, or
that does not move its data with 128-bit loads and stores.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

from aot_cases import CUDA_WIDE

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "aot"
ARCHITECTURES = ("8.0", "9.0", "10.0")


def tool(name: str) -> str:
    """cuobjdump or nvdisasm, of the CUDA toolkit or else of Triton."""
    found = shutil.which(name)
    triton = find_spec("triton")
    if not found and triton and triton.origin:
        found = shutil.which(name, path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if not found:
        sys.exit(f"{name} is not on PATH, nor in an installed Triton: install one of the two")
    return found


def build() -> Path:
    environment = {
        **os.environ,
        "ERASEDIFF_BUILD": "cuda",
        # Nothing is asked of what runs on the CPU but that it compiles and links.
        "ERASEDIFF_DEBUG": "1",
        "TORCH_CUDA_ARCH_LIST": ";".join(ARCHITECTURES),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
    }
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        f"--build-lib={BUILD / 'lib'}",
        f"--build-temp={BUILD / 'temp'}",
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stdout + result.stderr)
    (library,) = (BUILD / "lib").rglob("_C*.so")
    return library


def resources(library: Path) -> dict[tuple[str, str], dict[str, int]]:
    """{(architecture, mangled kernel): {"REG": 64, "STACK": 0, ...}}"""
    report = subprocess.run(
        [tool("cuobjdump"), "-res-usage", library], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    architecture = function = ""
    for line in report.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            function = match[1]
        elif "REG:" in line:
            found[architecture, function] = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


def memory_instructions(library: Path) -> dict[tuple[str, str], Counter[str]]:
    """{(architecture, mangled kernel): how often each of LDG, STG, LDG.128, STG.128, LDL and STL occurs}"""
    path = f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    process = subprocess.Popen(
        [tool("cuobjdump"), "-sass", library], stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path}
    )
    assert process.stdout is not None
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    architecture = function = ""
    for line in process.stdout:
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\w+)", line):
            function = match[1]
            found[architecture, function] = Counter()
        elif match := re.search(r"\b(LDG|STG|LDL|STL)(\.[\w.]+)?", line):
            found[architecture, function][match[1]] += 1
            found[architecture, function][f"{match[1]}.128"] += "128" in (match[2] or "")
    if process.wait():
        sys.exit("cuobjdump failed")
    return found


def short_name(function: str) -> str:
    for name in CUDA_WIDE:
        if name in function:
            return name
    return function


def wide_instructions(function: str) -> tuple[str, ...]:
    """Memory instructions that must have 128 bits; none in a kernel's variant for one element at a time."""
    return () if "kernelILi1E" in function else CUDA_WIDE.get(short_name(function), ())


def violations(function: str, used: dict[str, int], instructions: Counter[str]) -> list[str]:
    wrong = [f"{name.lower()} of {used[name]} bytes" for name in ("STACK", "LOCAL") if used.get(name)]
    wrong += [f"{instructions[name]} {name}" for name in ("LDL", "STL") if instructions[name]]
    wrong += [f"no 128-bit {name}" for name in wide_instructions(function) if not instructions[f"{name}.128"]]
    return wrong


def main() -> int:
    start = time.monotonic()
    print(f"compiling and linking for {', '.join(ARCHITECTURES)} ...", flush=True)
    library = build()
    print(f"{library.relative_to(ROOT)}: {library.stat().st_size / 2**20:.1f} MiB, {time.monotonic() - start:.0f} s")
    used, instructions = resources(library), memory_instructions(library)
    expected = {f"sm_{architecture.replace('.', '')}" for architecture in ARCHITECTURES}
    missing = expected - {architecture for architecture, _ in used}
    failures = [f"no code for {architecture}" for architecture in sorted(missing)]

    table: dict[tuple[str, str], list[tuple[int, Counter[str]]]] = defaultdict(list)
    for (architecture, function), kernel in sorted(used.items()):
        counts = instructions[architecture, function]
        failures += [f"{architecture} {function}: {wrong}" for wrong in violations(function, kernel, counts)]
        table[short_name(function), architecture].append((kernel["REG"], counts))
    print(f"{'kernel':30} {'arch':7} {'variants':>8} {'registers':>10} {'LDG.128':>8} {'STG.128':>8} {'local':>6}")
    for (name, architecture), kernels in sorted(table.items()):
        registers = [count for count, _ in kernels]
        total: Counter[str] = sum((counts for _, counts in kernels), Counter())
        print(
            f"{name:30} {architecture:7} {len(kernels):8} {min(registers):5}-{max(registers):<4} {total['LDG.128']:8} "
            f"{total['STG.128']:8} {total['LDL'] + total['STL']:6}"
        )
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(used)} kernels, {len(failures)} failures, {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
