# mypy: allow-untyped-calls
"""Compile every Triton kernel for GPUs that are not here, and check what the compilers made of it.

`python -m erasediff_kernels._triton.aot` prints a table and exits with 1 on a violation: registers spilled, local
memory used, full blocks that are not read and written 16 bytes at a time, offsets of 32 bits, or products and sums
fused where noise is drawn.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from erasediff_kernels._triton import constraint, losses, noise, reduction, sparse, topk, update

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One specialisation of a kernel, as its launcher would ask for it."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Types of the arguments, as in "*fp32"; pointers are aligned to 16 bytes, as torch allocates them."""
    constants: dict[str, Any]
    threads: int
    fused: bool = True
    """Whether products and sums may become FMAs; never where noise is drawn."""
    wide: tuple[int, int] | None = None
    """The least number of 16-byte loads and stores to global memory."""


@dataclass(kw_only=True, slots=True)
class Report:
    case: Case
    target: str
    registers: int = 0
    spills: int = 0
    local_bytes: int = 0
    wide_loads: int = 0
    wide_stores: int = 0
    violations: list[str] = field(default_factory=list)


def list_cases() -> Iterator[Case]:
    """Kernels over lists: full blocks must move 16 bytes per access."""
    f, h, u8 = tl.float32, tl.bfloat16, tl.uint8
    table = {"table_ptr": "*i64", "owners_ptr": "*i64"}
    gram = {**table, "partials_ptr": "*fp64", "total": "i32", "first": "i32"}
    scalars = {"scalars_ptr": "*fp64", "multiplier_ptr": "*fp32", "clip_scale_ptr": "*fp32", "finite_ptr": "*i1"}
    step = {**table, **scalars}

    def gram_case(name: str, r: Any, g: Any, mask: Any, wide: tuple[int, int]) -> Case:
        return Case(
            name=f"gradient_gram {name}",
            kernel=constraint.gradient_gram_kernel,
            types=gram,
            constants={"R": r, "G": g, "MASK": mask, "ALIGNED": True, "BLOCK": constraint.BLOCK},
            threads=constraint.THREADS,
            wide=wide,
        )

    yield gram_case("fp32", f, f, None, (2, 0))
    yield gram_case("bf16", h, h, None, (2, 0))
    yield gram_case("fp32 masked", f, f, u8, (2, 0))

    def adamw_case(name: str, wide: tuple[int, int], rounding: bool = False, **dtypes: Any) -> Case:
        absent = dict.fromkeys(("M_ABSMAX", "V_ABSMAX", "EMA", "COPY", "MASK"))
        columns = {"P": f, "M": f, "V": f, "R": f, "G": f, **absent, **dtypes}
        constants = {**columns, "COMPUTE": f, "ALIGNED": True, "BLOCK": update.BLOCK}
        return Case(
            name=f"constrained_adamw_ {name}",
            kernel=update.constrained_adamw_kernel,
            types={**step, "key_ptr": "*i64"} if rounding else step,
            constants=constants if rounding else {**constants, "key_ptr": None},
            threads=update.THREADS,
            fused="M_ABSMAX" not in dtypes,
            wide=wide,
        )

    yield adamw_case("fp32", (5, 3))
    yield adamw_case("fp32, ema, bf16 copy", (6, 5), EMA=f, COPY=h)
    yield adamw_case("fp32 masked", (5, 3), MASK=u8)
    yield adamw_case("fp32, bf16 gradients", (5, 3), R=h, G=h)
    yield adamw_case("bf16, stochastic", (5, 3), rounding=True, P=h, R=h, G=h)
    codes = {"M": tl.int8, "V": u8, "M_ABSMAX": f, "V_ABSMAX": f}
    yield adamw_case("fp32, 8-bit moments", (3, 1), **codes)
    yield adamw_case("bf16, 8-bit moments", (3, 1), rounding=True, P=h, R=h, G=h, **codes)

    def sgd_case(name: str, wide: tuple[int, int], rounding: bool = False, **dtypes: Any) -> Case:
        columns = {"P": f, "BUFFER": f, "R": f, "G": f, "EMA": None, "COPY": None, "MASK": None, **dtypes}
        constants = {**columns, "NESTEROV": False, "COMPUTE": f, "ALIGNED": True, "BLOCK": update.BLOCK}
        return Case(
            name=f"constrained_sgd_ {name}",
            kernel=update.constrained_sgd_kernel,
            types={**step, "key_ptr": "*i64"} if rounding else step,
            constants=constants if rounding else {**constants, "key_ptr": None},
            threads=update.THREADS,
            wide=wide,
        )

    yield sgd_case("fp32", (4, 2))
    yield sgd_case("bf16, stochastic", (4, 2), rounding=True, P=h, R=h, G=h)


def sample_cases() -> Iterator[Case]:
    """Kernels over samples, with a sample size divisible by 16 as images and latents have."""
    address = {"ids_ptr": "*i64", "key_ptr": "*i64"}
    size = {"N": "i32", "blocks": "i32", "role": "i32"}
    block = {"BLOCK": noise.BLOCK}
    yield Case(
        name="philox_bits",
        kernel=noise.philox_bits_kernel,
        types={**address, "out_ptr": "*i64", **size},
        constants=block,
        threads=noise.THREADS,
        wide=(0, 1),
    )
    for distribution, dtype in (("normal", "fp32"), ("uniform", "bf16")):
        yield Case(
            name=f"philox_noise {distribution} {dtype}",
            kernel=noise.philox_noise_kernel,
            types={**address, "out_ptr": f"*{dtype}", **size},
            constants={**block, "DISTRIBUTION": distribution},
            threads=noise.THREADS,
            fused=False,
            wide=(0, 1),
        )
    for dtype in ("fp32", "bf16"):
        data, coefficient = f"*{dtype}", "*fp32"
        coefficients = {"alpha_ptr": coefficient, "sigma_ptr": coefficient}
        drawn = {"noise_ptr": None}
        yield Case(
            name=f"add_noise {dtype}",
            kernel=noise.add_noise_kernel,
            types={**coefficients, "sample_ptr": data, **address, "out_ptr": data, **size},
            constants={**block, **drawn},
            threads=noise.THREADS,
            fused=False,
            wide=(1, 1),
        )
        loss = {
            "prediction_ptr": data,
            "weight_ptr": coefficient,
            **address,
            "grad_ptr": data,
            "partials_ptr": "*fp64",
            **size,
        }
        yield Case(
            name=f"denoising_loss v {dtype}",
            kernel=losses.squared_error_kernel,
            types={**loss, **coefficients, "sample_ptr": data},
            constants={**block, **drawn, "PREDICTION_TYPE": "v_prediction", "DISTRIBUTION": "normal"},
            threads=noise.THREADS,
            fused=False,
            wide=(2, 1),
        )
        absent = {"sample_ptr": None, "alpha_ptr": None, "sigma_ptr": None}
        yield Case(
            name=f"deviation_loss uniform {dtype}",
            kernel=losses.squared_error_kernel,
            types=loss,
            constants={**block, **drawn, **absent, "PREDICTION_TYPE": "epsilon", "DISTRIBUTION": "uniform"},
            threads=noise.THREADS,
            fused=False,
            wide=(1, 1),
        )


def sparse_cases() -> Iterator[Case]:
    """Kernels over sparse codes, with a width divisible by 16 as that of every model's blocks."""
    for dtype in ("fp32", "bf16"):
        data = f"*{dtype}"
        size = {"N": "i32", "k": "i32"}
        yield Case(
            name=f"topk_encode {dtype}",
            kernel=topk.topk_encode_kernel,
            types={"preactivations_ptr": data, "values_ptr": data, "indices_ptr": "*i32", **size},
            constants={"KEPT": 32, "BLOCK": topk.BLOCK},
            threads=topk.THREADS,
        )
        yield Case(
            name=f"sparse_decode {dtype}",
            kernel=sparse.sparse_decode_kernel,
            types={
                "values_ptr": data,
                "indices_ptr": "*i32",
                "weight_ptr": data,
                "bias_ptr": data,
                "out_ptr": data,
                **size,
                "blocks": "i32",
            },
            constants={"COMPUTE": tl.float32, "BLOCK": sparse.BLOCK},
            threads=sparse.THREADS,
            wide=(1, 1),
        )
        yield Case(
            name=f"gather_dot {dtype}",
            kernel=sparse.gather_dot_kernel,
            types={"rows_ptr": data, "indices_ptr": "*i32", "weight_ptr": data, "out_ptr": data, **size},
            constants={"COMPUTE": tl.float32, "ROWS": sparse.ROWS, "COLUMNS": sparse.COLUMNS},
            threads=2 * sparse.THREADS,
            wide=(1, 0),
        )
        yield Case(
            name=f"scatter_outer {dtype}",
            kernel=sparse.scatter_outer_kernel,
            types={
                "values_ptr": data,
                "rows_ptr": data,
                "order_ptr": "*i64",
                "starts_ptr": "*i64",
                "out_ptr": data,
                **size,
                "blocks": "i32",
            },
            constants={"COMPUTE": tl.float32, "BLOCK": sparse.BLOCK},
            threads=sparse.THREADS,
            wide=(1, 1),
        )


def scalar_cases() -> Iterator[Case]:
    """Kernels of a single program."""
    yield Case(
        name="sum_partials",
        kernel=reduction.sum_partials_kernel,
        types={"partials_ptr": "*fp64", "out_ptr": "*fp64", "n": "i32"},
        constants={"BLOCK": reduction.BLOCK},
        threads=reduction.THREADS,
    )
    outputs = {"multiplier_ptr": "*fp32", "clip_scale_ptr": "*fp32", "norm_ptr": "*fp32", "finite_ptr": "*i1"}
    for barrier in ("norm", "gap", "fixed", "cosine"):
        gap = {"gap_ptr": "*fp32"} if barrier == "gap" else {}
        yield Case(
            name=f"constraint_multiplier {barrier}",
            kernel=constraint.constraint_multiplier_kernel,
            types={"gram_ptr": "*fp64", **gap, **outputs, "eta_bits": "i64", "max_norm_bits": "i64"},
            constants={"BARRIER": barrier, "CLIP": True, **({} if gap else {"gap_ptr": None})},
            threads=1,
        )
    common = {"out_ptr": "*fp64", "finite_ptr": "*i1", "lr_ptr": "*fp32", "step_ptr": "*fp32"}
    for name, kernel, hyperparameters in (
        ("adamw", update.adamw_scalars_kernel, ("beta1", "beta2", "eps", "weight_decay", "ema_decay")),
        ("sgd", update.sgd_scalars_kernel, ("momentum", "weight_decay", "ema_decay")),
    ):
        yield Case(
            name=f"{name} scalars",
            kernel=kernel,
            types={**common, **{f"{hyperparameter}_bits": "i64" for hyperparameter in hyperparameters}},
            constants={},
            threads=1,
        )


def cases() -> list[Case]:
    return [*list_cases(), *sample_cases(), *sparse_cases(), *scalar_cases()]


def compile_case(case: Case, target: str) -> Any:
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


def examine(case: Case, target: str) -> Report:
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
    jobs = [(case, target) for case in cases() for target in targets]
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
