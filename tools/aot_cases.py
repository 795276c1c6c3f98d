# mypy: allow-untyped-calls
"""Kernels to compile ahead of time for GPUs that are not here, and the instructions that they must have.

An operator adds its Triton specialisations to `triton_cases` and its CUDA kernels to `CUDA_WIDE`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from erasediff_kernels._triton import (
    constrained_adamw,
    constrained_sgd,
    constraint,
    losses,
    noise,
    reduction,
    sparse,
    topk,
    update,
)

# The memory instructions of a CUDA kernel that must have 128 bits.
CUDA_WIDE = {
    "gradient_gram_kernel": ("LDG",),
    "constrained_update_kernel": ("LDG", "STG"),
    "constrained_update_codes_kernel": ("LDG", "STG"),
    "squared_error_kernel": ("LDG", "STG"),
    "add_noise_kernel": ("LDG", "STG"),
    "philox_noise_kernel": ("STG",),
    "philox_bits_kernel": (),
    "sum_columns": (),
    "prepare_step": (),
    "constraint_multiplier_kernel": (),
    "clip_combination_kernel": (),
    "topk_encode_kernel": (),
    "sparse_decode_kernel": ("LDG", "STG"),
    "gather_dot_kernel": ("LDG",),
    "scatter_pieces_kernel": ("LDG", "STG"),
    "scatter_seams_kernel": ("LDG", "STG"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonCase:
    """One specialisation of a kernel, as its launcher would ask for it."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Types of the arguments, as in "*fp32"; pointers are aligned to 16 bytes, as torch allocates them."""
    constants: dict[str, Any]
    threads: int
    fused: bool = True
    """Products and sums may become FMAs; never where noise is drawn."""
    wide: tuple[int, int] | None = None
    """The least number of 16-byte loads and stores to global memory."""


def list_cases() -> Iterator[TritonCase]:
    """Kernels over lists: full blocks must move 16 bytes per access."""
    f, h, u8 = tl.float32, tl.bfloat16, tl.uint8
    table = {"table_ptr": "*i64", "owners_ptr": "*i64"}
    gram = {**table, "partials_ptr": "*fp64", "total": "i32", "first": "i32"}
    scalars = {"scalars_ptr": "*fp64", "multiplier_ptr": "*fp32", "clip_scale_ptr": "*fp32", "finite_ptr": "*i1"}
    step = {**table, **scalars}

    def gram_case(name: str, r: Any, g: Any, mask: Any, wide: tuple[int, int]) -> TritonCase:
        return TritonCase(
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

    def adamw_case(
        name: str, wide: tuple[int, int], rounding: bool = False, both: bool = False, **dtypes: Any
    ) -> TritonCase:
        absent = dict.fromkeys(("M_ABSMAX", "V_ABSMAX", "EMA", "COPY", "MASK"))
        columns = {"P": f, "M": f, "V": f, "R": f, "G": f, **absent, **dtypes}
        constants = {**columns, "BOTH": both, "COMPUTE": f, "ALIGNED": True, "BLOCK": update.BLOCK}
        return TritonCase(
            name=f"constrained_adamw_ {name}",
            kernel=constrained_adamw.constrained_adamw_kernel,
            types={**step, "key_ptr": "*i64"} if rounding else step,
            constants=constants if rounding else {**constants, "key_ptr": None},
            threads=update.THREADS,
            fused="M_ABSMAX" not in dtypes,
            wide=wide,
        )

    yield adamw_case("fp32", (5, 3))
    yield adamw_case("fp32, ema, bf16 copy", (6, 5), EMA=f, COPY=h)
    yield adamw_case("fp32, two coefficients", (5, 3), both=True)
    yield adamw_case("fp32 masked", (5, 3), MASK=u8)
    yield adamw_case("fp32, bf16 gradients", (5, 3), R=h, G=h)
    yield adamw_case("bf16, stochastic", (5, 3), rounding=True, P=h, R=h, G=h)
    codes = {"M": tl.int8, "V": u8, "M_ABSMAX": f, "V_ABSMAX": f}
    yield adamw_case("fp32, 8-bit moments", (3, 1), **codes)
    yield adamw_case("bf16, 8-bit moments", (3, 1), rounding=True, P=h, R=h, G=h, **codes)

    def sgd_case(name: str, wide: tuple[int, int], rounding: bool = False, **dtypes: Any) -> TritonCase:
        columns = {"P": f, "BUFFER": f, "R": f, "G": f, "EMA": None, "COPY": None, "MASK": None, **dtypes}
        constants = {**columns, "NESTEROV": False, "BOTH": False, "COMPUTE": f, "ALIGNED": True, "BLOCK": update.BLOCK}
        return TritonCase(
            name=f"constrained_sgd_ {name}",
            kernel=constrained_sgd.constrained_sgd_kernel,
            types={**step, "key_ptr": "*i64"} if rounding else step,
            constants=constants if rounding else {**constants, "key_ptr": None},
            threads=update.THREADS,
            wide=wide,
        )

    yield sgd_case("fp32", (4, 2))
    yield sgd_case("bf16, stochastic", (4, 2), rounding=True, P=h, R=h, G=h)


def sample_cases() -> Iterator[TritonCase]:
    """Kernels over samples, with a sample size divisible by 16 as images and latents have."""
    address = {"ids_ptr": "*i64", "key_ptr": "*i64"}
    size = {"N": "i32", "blocks": "i32", "role": "i32"}
    block = {"BLOCK": noise.BLOCK}
    yield TritonCase(
        name="philox_bits",
        kernel=noise.philox_bits_kernel,
        types={**address, "out_ptr": "*i64", **size},
        constants=block,
        threads=noise.THREADS,
        wide=(0, 1),
    )
    for distribution, dtype in (("normal", "fp32"), ("uniform", "bf16")):
        yield TritonCase(
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
        yield TritonCase(
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
        yield TritonCase(
            name=f"denoising_loss v {dtype}",
            kernel=losses.squared_error_kernel,
            types={**loss, **coefficients, "sample_ptr": data},
            constants={**block, **drawn, "PREDICTION_TYPE": "v_prediction", "DISTRIBUTION": "normal"},
            threads=noise.THREADS,
            fused=False,
            wide=(2, 1),
        )
        absent = {"sample_ptr": None, "alpha_ptr": None, "sigma_ptr": None}
        yield TritonCase(
            name=f"deviation_loss uniform {dtype}",
            kernel=losses.squared_error_kernel,
            types=loss,
            constants={**block, **drawn, **absent, "PREDICTION_TYPE": "epsilon", "DISTRIBUTION": "uniform"},
            threads=noise.THREADS,
            fused=False,
            wide=(1, 1),
        )


def sparse_cases() -> Iterator[TritonCase]:
    """Kernels over sparse codes, with a width divisible by 16 as that of every model's blocks."""
    for dtype in ("fp32", "bf16"):
        data = f"*{dtype}"
        size = {"N": "i32", "k": "i32"}
        yield TritonCase(
            name=f"topk_encode {dtype}",
            kernel=topk.topk_encode_kernel,
            types={"preactivations_ptr": data, "values_ptr": data, "indices_ptr": "*i32", **size},
            constants={"KEPT": 32, "BLOCK": topk.BLOCK},
            threads=topk.THREADS,
        )
        yield TritonCase(
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
        yield TritonCase(
            name=f"gather_dot {dtype}",
            kernel=sparse.gather_dot_kernel,
            types={"rows_ptr": data, "indices_ptr": "*i32", "weight_ptr": data, "out_ptr": data, **size},
            constants={"COMPUTE": tl.float32, "ROWS": sparse.ROWS, "COLUMNS": sparse.COLUMNS},
            threads=2 * sparse.THREADS,
            wide=(1, 0),
        )
        yield TritonCase(
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


def scalar_cases() -> Iterator[TritonCase]:
    """Kernels of a single program."""
    yield TritonCase(
        name="sum_partials",
        kernel=reduction.sum_partials_kernel,
        types={"partials_ptr": "*fp64", "out_ptr": "*fp64", "n": "i32"},
        constants={"BLOCK": reduction.BLOCK},
        threads=reduction.THREADS,
    )
    outputs = {"multiplier_ptr": "*fp32", "clip_scale_ptr": "*fp32", "norm_ptr": "*fp32", "finite_ptr": "*i1"}
    for barrier in ("norm", "gap", "fixed", "cosine"):
        gap = {"gap_ptr": "*fp32"} if barrier == "gap" else {}
        yield TritonCase(
            name=f"constraint_multiplier {barrier}",
            kernel=constraint.constraint_multiplier_kernel,
            types={"gram_ptr": "*fp64", **gap, **outputs, "eta_bits": "i64", "max_norm_bits": "i64"},
            constants={"BARRIER": barrier, "CLIP": True, **({} if gap else {"gap_ptr": None})},
            threads=1,
        )
    yield TritonCase(
        name="clip_combination",
        kernel=constraint.clip_combination_kernel,
        types={"gram_ptr": "*fp64", "coefficients_ptr": "*fp64", **outputs, "max_norm_bits": "i64"},
        constants={"CLIP": True},
        threads=1,
    )
    common = {"out_ptr": "*fp64", "finite_ptr": "*i1", "lr_ptr": "*fp32", "step_ptr": "*fp32"}
    for name, kernel, hyperparameters in (
        ("adamw", constrained_adamw.adamw_scalars_kernel, ("beta1", "beta2", "eps", "weight_decay", "ema_decay")),
        ("sgd", constrained_sgd.sgd_scalars_kernel, ("momentum", "weight_decay", "ema_decay")),
    ):
        yield TritonCase(
            name=f"{name} scalars",
            kernel=kernel,
            types={**common, **{f"{hyperparameter}_bits": "i64" for hyperparameter in hyperparameters}},
            constants={},
            threads=1,
        )


def triton_cases() -> list[TritonCase]:
    return [*list_cases(), *sample_cases(), *sparse_cases(), *scalar_cases()]
