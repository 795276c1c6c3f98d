"""Schema and fake of every operator in the `erasediff` namespace.

The schemas are defined here, in Python, so that an operator exists whatever was compiled; which implementation runs on
real tensors is `_dispatch`'s business. Notation: B samples, "..." the dimensions of a sample, N elements per sample.
Every output is contiguous, whatever the strides of the inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from erasediff_kernels import _dispatch

NAMESPACE = "erasediff"

SCHEMAS = {
    "philox_bits": "(Tensor sample_ids, Tensor key, int role, int words) -> Tensor",
    "philox_noise": (
        "(Tensor sample_ids, Tensor key, int role, SymInt[] shape, str distribution, ScalarType dtype) -> Tensor"
    ),
    "add_noise": (
        "(Tensor sample, Tensor alpha, Tensor sigma, Tensor? noise, Tensor? sample_ids, Tensor? key, int role) "
        "-> Tensor"
    ),
    "denoising_loss": (
        "(Tensor prediction, Tensor sample, Tensor alpha, Tensor sigma, Tensor weight, Tensor? noise, "
        "Tensor? sample_ids, Tensor? key, int role, str prediction_type) -> (Tensor loss, Tensor grad)"
    ),
    "deviation_loss": (
        "(Tensor prediction, Tensor weight, Tensor? target, Tensor? sample_ids, Tensor? key, int role, "
        "str distribution) -> (Tensor loss, Tensor grad)"
    ),
    "gradient_gram": "(Tensor[] retain, Tensor[] forget, Tensor[] masks) -> Tensor",
    "constraint_multiplier": (
        "(Tensor gram, str barrier, float eta, Tensor? gap, float? max_norm) "
        "-> (Tensor multiplier, Tensor clip_scale, Tensor norm, Tensor finite)"
    ),
    "constrained_adamw_": (
        "(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] exp_avg_absmaxes, "
        "Tensor(e!)[] exp_avg_sq_absmaxes, Tensor[] retain, Tensor[] forget, Tensor(f!)[] ema, Tensor(g!)[] copies, "
        "Tensor[] masks, Tensor multiplier, Tensor clip_scale, Tensor finite, Tensor lr, Tensor(h!) step, "
        "float beta1, float beta2, float eps, float weight_decay, float ema_decay, Tensor? rounding_key) -> ()"
    ),
    "constrained_sgd_": (
        "(Tensor(a!)[] params, Tensor(b!)[] momentum_buffers, Tensor[] retain, Tensor[] forget, Tensor(c!)[] ema, "
        "Tensor(d!)[] copies, Tensor[] masks, Tensor multiplier, Tensor clip_scale, Tensor finite, Tensor lr, "
        "Tensor(e!) step, float momentum, bool nesterov, float weight_decay, float ema_decay, "
        "Tensor? rounding_key) -> ()"
    ),
    "topk_encode": "(Tensor preactivations, int k) -> (Tensor values, Tensor indices)",
    "sparse_decode": "(Tensor values, Tensor indices, Tensor weight, Tensor? bias) -> Tensor",
    "gather_dot": "(Tensor rows, Tensor indices, Tensor weight) -> Tensor",
    "scatter_outer": "(Tensor values, Tensor rows, Tensor order, Tensor starts) -> Tensor",
}

OPS = tuple(SCHEMAS)


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


FAKES: dict[str, Callable[..., Any]] = {
    "philox_bits": fake_philox_bits,
    "philox_noise": fake_philox_noise,
    "add_noise": fake_add_noise,
    "denoising_loss": fake_loss,
    "deviation_loss": fake_loss,
    "gradient_gram": fake_gradient_gram,
    "constraint_multiplier": fake_constraint_multiplier,
    "constrained_adamw_": fake_update,
    "constrained_sgd_": fake_update,
    "topk_encode": fake_topk_encode,
    "sparse_decode": fake_sparse_decode,
    "gather_dot": fake_gather_dot,
    "scatter_outer": fake_scatter_outer,
}


for op, schema in SCHEMAS.items():
    qualified = f"{NAMESPACE}::{op}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, ("CPU", "CUDA"), _dispatch.kernel(op))
    torch.library.register_fake(qualified, FAKES[op])
