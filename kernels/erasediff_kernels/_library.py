"""The table of operators: schema, fake, and which implementations there are.

Everything that enumerates operators reads `OPS`: registration with torch, the backends, `python -m
erasediff_kernels.info`, the ahead-of-time checks and the tests. Notation: B samples, "..." the dimensions of a sample,
N elements per sample. Every output is contiguous, whatever the strides of the inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """One row of `OPS`: what all implementations of an operator agree on.

    Attributes:
        schema: arguments and results, as in `torch.library.define`; that of `torch.ops.erasediff.<op>`, and of the
            compiled `torch.ops.erasediff_compiled.<op>`.
        fake: shapes and dtypes of the results, without computing them.
        file: name of its files: `ops/<file>.py`, `csrc/cpu/<file>.cpp`, `csrc/cuda/<file>.cu` and
            `tests/kernels/test_<file>.py`.
        family: name of the modules that hold its eager reference and its Triton implementation, `reference/<family>.py`
            and `_triton/<family>.py`: a function of the operator's name, with the arguments of the schema.
        implementations: of "C++", "CUDA" and "Triton", those that exist. The eager reference always does.
        checks_lists: the compiled implementation takes lists of tensors as a caller gives them, and returns None or
            False where it does not accept them (`csrc/lists.h`); see `_dispatch.fast_path`.
    """

    schema: str
    fake: Callable[..., Any]
    file: str
    family: str
    implementations: tuple[str, ...] = ("C++", "CUDA", "Triton")
    checks_lists: bool = False


def fake_philox_bits(sample_ids: Tensor, key: Tensor, role: int, words: int) -> Tensor:
    return sample_ids.new_empty((sample_ids.shape[0], words))


def fake_philox_noise(
    sample_ids: Tensor, key: Tensor, role: int, shape: Sequence[int], distribution: str, dtype: torch.dtype
) -> Tensor:
    return sample_ids.new_empty((sample_ids.shape[0], *shape), dtype=dtype)


def fake_add_noise(sample: Tensor, *_: Any) -> Tensor:
    return sample.new_empty(sample.shape)


def fake_loss(prediction: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    loss_dtype = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    return prediction.new_empty((), dtype=loss_dtype), prediction.new_empty(prediction.shape)


def fake_gradient_gram(retain: list[Tensor], forget: list[Tensor], masks: list[Tensor]) -> Tensor:
    return retain[0].new_empty((3,), dtype=torch.float64)


def fake_constraint_multiplier(
    gram: Tensor, barrier: str, eta: float, gap: Tensor | None, max_norm: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    multiplier, clip_scale, norm = (gram.new_empty((), dtype=torch.float32) for _ in range(3))
    return multiplier, clip_scale, norm, gram.new_empty((), dtype=torch.bool)


def fake_clip_combination(
    gram: Tensor, coefficients: Tensor, max_norm: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    clip_scale, norm = (gram.new_empty((), dtype=torch.float32) for _ in range(2))
    return gram.new_empty((2,), dtype=torch.float32), clip_scale, norm, gram.new_empty((), dtype=torch.bool)


def fake_update(*_: Any) -> None:
    """In place: nothing to allocate."""


def fake_topk_encode(preactivations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (preactivations.shape[0], k)
    return preactivations.new_empty(shape), preactivations.new_empty(shape, dtype=torch.int32)


def fake_sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return values.new_empty((values.shape[0], weight.shape[1]))


def fake_gather_dot(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(indices.shape)


def fake_scatter_outer(values: Tensor, rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return rows.new_empty((starts.shape[0] - 1, rows.shape[1]))


OPS = {
    "philox_bits": Operator(
        schema="(Tensor sample_ids, Tensor key, int role, int words) -> Tensor",
        fake=fake_philox_bits,
        file="philox",
        family="noise",
    ),
    "philox_noise": Operator(
        schema=(
            "(Tensor sample_ids, Tensor key, int role, SymInt[] shape, str distribution, ScalarType dtype) -> Tensor"
        ),
        fake=fake_philox_noise,
        file="philox",
        family="noise",
    ),
    "add_noise": Operator(
        schema=(
            "(Tensor sample, Tensor alpha, Tensor sigma, Tensor? noise, Tensor? sample_ids, Tensor? key, int role) "
            "-> Tensor"
        ),
        fake=fake_add_noise,
        file="add_noise",
        family="noise",
    ),
    "denoising_loss": Operator(
        schema=(
            "(Tensor prediction, Tensor sample, Tensor alpha, Tensor sigma, Tensor weight, Tensor? noise, "
            "Tensor? sample_ids, Tensor? key, int role, str prediction_type) -> (Tensor loss, Tensor grad)"
        ),
        fake=fake_loss,
        file="denoising_loss",
        family="losses",
    ),
    "deviation_loss": Operator(
        schema=(
            "(Tensor prediction, Tensor weight, Tensor? target, Tensor? sample_ids, Tensor? key, int role, "
            "str distribution) -> (Tensor loss, Tensor grad)"
        ),
        fake=fake_loss,
        file="deviation_loss",
        family="losses",
    ),
    "gradient_gram": Operator(
        schema="(Tensor[] retain, Tensor[] forget, Tensor[] masks) -> Tensor",
        fake=fake_gradient_gram,
        file="gradient_gram",
        family="constraint",
        checks_lists=True,
    ),
    "constraint_multiplier": Operator(
        schema=(
            "(Tensor gram, str barrier, float eta, Tensor? gap, float? max_norm) "
            "-> (Tensor multiplier, Tensor clip_scale, Tensor norm, Tensor finite)"
        ),
        fake=fake_constraint_multiplier,
        file="constraint_multiplier",
        family="constraint",
    ),
    "clip_combination": Operator(
        schema=(
            "(Tensor gram, Tensor coefficients, float? max_norm) "
            "-> (Tensor multiplier, Tensor clip_scale, Tensor norm, Tensor finite)"
        ),
        fake=fake_clip_combination,
        file="clip_combination",
        family="constraint",
    ),
    "constrained_adamw_": Operator(
        schema=(
            "(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] exp_avg_absmaxes, "
            "Tensor(e!)[] exp_avg_sq_absmaxes, Tensor[] retain, Tensor[] forget, Tensor(f!)[] ema, "
            "Tensor(g!)[] copies, Tensor[] masks, Tensor multiplier, Tensor clip_scale, Tensor finite, Tensor lr, "
            "Tensor(h!) step, float beta1, float beta2, float eps, float weight_decay, float ema_decay, "
            "Tensor? rounding_key) -> ()"
        ),
        fake=fake_update,
        file="constrained_adamw",
        family="constrained_adamw",
        checks_lists=True,
    ),
    "constrained_sgd_": Operator(
        schema=(
            "(Tensor(a!)[] params, Tensor(b!)[] momentum_buffers, Tensor[] retain, Tensor[] forget, Tensor(c!)[] ema, "
            "Tensor(d!)[] copies, Tensor[] masks, Tensor multiplier, Tensor clip_scale, Tensor finite, Tensor lr, "
            "Tensor(e!) step, float momentum, bool nesterov, float weight_decay, float ema_decay, "
            "Tensor? rounding_key) -> ()"
        ),
        fake=fake_update,
        file="constrained_sgd",
        family="constrained_sgd",
        checks_lists=True,
    ),
    "topk_encode": Operator(
        schema="(Tensor preactivations, int k) -> (Tensor values, Tensor indices)",
        fake=fake_topk_encode,
        file="topk_encode",
        family="topk",
    ),
    "sparse_decode": Operator(
        schema="(Tensor values, Tensor indices, Tensor weight, Tensor? bias) -> Tensor",
        fake=fake_sparse_decode,
        file="sparse_decode",
        family="sparse",
    ),
    "gather_dot": Operator(
        schema="(Tensor rows, Tensor indices, Tensor weight) -> Tensor",
        fake=fake_gather_dot,
        file="gather_dot",
        family="sparse",
    ),
    "scatter_outer": Operator(
        schema="(Tensor values, Tensor rows, Tensor order, Tensor starts) -> Tensor",
        fake=fake_scatter_outer,
        file="scatter_outer",
        family="sparse",
    ),
}
