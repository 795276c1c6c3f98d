# mypy: allow-untyped-calls
"""Compile every Triton kernel for GPUs that are not here, and check what the compilers made of it.

`python tools/aot_triton.py` prints a table and exits with 1 on a violation: registers spilled, local
memory used, full blocks that are not read and written 16 bytes at a time, offsets of 32 bits, or products and sums
fused where noise is drawn.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from aot_cases import TritonCase, triton_cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(kw_only=True, slots=True)
class Report:
    case: TritonCase
    target: str
    registers: int = 0
    spills: int = 0
    local_bytes: int = 0
    wide_loads: int = 0
    wide_stores: int = 0
    violations: list[str] = field(default_factory=list)


def compile_case(case: TritonCase, target: str) -> Any:
    names = case.kernel.arg_names
    missing = set(names) - set(case.types) - set(case.constants)
    assert not missing, f"{case.name}: no type for {missing}"
    signature = {name: case.types.get(name, "constexpr") for name in names}
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (index,): divisible
        for index, name in enumerate(names)
        if name in case.types and (name == "N" or signature[name].startswith("*"))
    }
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    gpu = TARGETS[target]
    return triton.compile(
        ASTSource(case.kernel, signature, constants, attributes),
        target=gpu,
        options={"num_warps": max(1, case.threads // gpu.warp_size), "enable_fp_fusion": case.fused},
    )


def tool(name: str) -> str:
    """A disassembler that ships with Triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def examine_nvidia(report: Report, compiled: Any) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run(tool("cuobjdump"), "--dump-resource-usage", file.name)
        assembly = run(tool("nvdisasm"), "-c", file.name)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    if not report.case.fused and "fma.rn.f32" in compiled.asm["ptx"]:
        report.violations.append("a fused multiply-add in a kernel that draws noise")
    report.registers = found["REG"]
    report.local_bytes = found["STACK"] + found["LOCAL"]
    report.spills = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
    report.wide_loads = len(re.findall(r"\bLDG\.E[.\w]*\.(?:128|256)\b", assembly))
    report.wide_stores = len(re.findall(r"\bSTG\.E[.\w]*\.(?:128|256)\b", assembly))


def examine_amd(report: Report, compiled: Any) -> None:
    assembly = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        return sum(map(int, re.findall(rf"\.{name}:\s+(\d+)", assembly)))

    report.registers = value("vgpr_count")
    report.spills = value("vgpr_spill_count") + value("sgpr_spill_count")
    report.local_bytes = value("private_segment_fixed_size")
    report.wide_loads = len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly))
    report.wide_stores = len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", assembly))


def examine(case: TritonCase, target: str) -> Report:
    report = Report(case=case, target=target)
    compiled = compile_case(case, target)
    if TARGETS[target].backend == "cuda":
        examine_nvidia(report, compiled)
    else:
        examine_amd(report, compiled)
    if re.search(r"tt\.addptr .*tensor<\d+xi32>", compiled.asm["ttir"]):
        report.violations.append("32-bit offsets")
    if report.spills:
        report.violations.append(f"{report.spills} spills")
    if report.local_bytes:
        report.violations.append(f"{report.local_bytes} bytes of local memory")
    if case.wide is not None:
        loads, stores = case.wide
        if report.wide_loads < loads or report.wide_stores < stores:
            report.violations.append(f"fewer than {loads} loads and {stores} stores of 16 bytes")
    return report


def main(targets: Sequence[str] = tuple(TARGETS)) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 2
    jobs = [(case, target) for case in triton_cases() for target in targets]
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        reports = list(pool.map(lambda job: examine(*job), jobs))
    print(f"Triton {triton.__version__}, torch {torch.__version__}\n")
    print(f"{'kernel':<40} {'target':<8} {'regs':>4} {'spills':>6} {'local':>5} {'ld128':>5} {'st128':>5}")
    for report in reports:
        row = (
            f"{report.case.name:<40} {report.target:<8} {report.registers:>4} {report.spills:>6} "
            f"{report.local_bytes:>5} {report.wide_loads:>5} {report.wide_stores:>5}  {'; '.join(report.violations)}"
        )
        print(row.rstrip())
    bad = sum(bool(report.violations) for report in reports)
    print(f"\n{len(reports)} compilations, {bad} with violations")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
