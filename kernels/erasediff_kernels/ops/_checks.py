"""Argument checks shared by the public functions; each raises ValueError: what is wrong; what to do."""

from collections.abc import Sequence

import torch
from torch import Tensor

DATA_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_data(name: str, tensor: Tensor) -> None:
    """Check a [B, ...] tensor of a supported floating type."""
    if tensor.dtype not in DATA_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; convert it to float32, bfloat16, float16 or float64")
    if tensor.dim() == 0:
        raise ValueError(f"{name} is a 0-D tensor; give it a batch dimension, [B, ...]")


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Check for the same shape, dtype and device as another argument."""
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but {like_name} has {tuple(like.shape)}; make them the same"
        )
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} is {tensor.dtype}, but {like_name} is {like.dtype}; convert one to the other")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but {like_name} is on {like.device}; move one to the other")


def per_sample(name: str, vector: Tensor, data: Tensor) -> Tensor:
    """A float vector [B] on the device of `data`, converted to float32, or to float64 for float64 data."""
    batch = data.shape[0]
    if vector.shape != (batch,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; it must hold one number per sample, ({batch},)")
    if vector.device != data.device:
        raise ValueError(f"{name} is on {vector.device}, but the samples are on {data.device}; move it there")
    if not vector.dtype.is_floating_point:
        raise ValueError(f"{name} has dtype {vector.dtype}; convert it to a floating type")
    return vector.to(torch.float64 if data.dtype == torch.float64 else torch.float32)


def sample_weight(weight: Tensor | None, data: Tensor) -> Tensor:
    """Weights of the samples in a loss; by default 1/B each, so that the loss is the mean over the batch."""
    if weight is not None:
        return per_sample("weight", weight, data)
    batch = data.shape[0]
    dtype = torch.float64 if data.dtype == torch.float64 else torch.float32
    return torch.full((batch,), 1.0 / max(1, batch), dtype=dtype, device=data.device)


def check_address(sample_ids: Tensor, key: Tensor, role: int) -> None:
    """Check the address of noise: sample_ids int64 [B], key int64 [2] = (seed, step) on one device, role 0 .. 255."""
    if sample_ids.dtype != torch.int64 or sample_ids.dim() != 1:
        raise ValueError(
            f"sample_ids is {sample_ids.dtype} with shape {tuple(sample_ids.shape)}; give one int64 per sample, (B,)"
        )
    if key.dtype != torch.int64 or key.shape != (2,):
        raise ValueError(f"key is {key.dtype} with shape {tuple(key.shape)}; give int64 (seed, step), shape (2,)")
    if key.device != sample_ids.device:
        raise ValueError(f"key is on {key.device}, but sample_ids on {sample_ids.device}; move one to the other")
    if not 0 <= role <= 255:
        raise ValueError(f"role is {role}; it must lie in 0 .. 255")


def check_given_or_drawn(
    name: str, given: Tensor | None, sample_ids: Tensor | None, key: Tensor | None, role: int, data: Tensor
) -> None:
    """Check that there is either a tensor like the data or an address to draw it from."""
    if given is not None:
        if sample_ids is not None or key is not None:
            raise ValueError(f"both {name} and sample_ids/key are given; leave out one of them")
        check_like(name, given, "the other tensor", data)
        return
    if sample_ids is None or key is None:
        raise ValueError(f"neither {name} nor both of sample_ids and key are given; there is nothing to draw from")
    check_address(sample_ids, key, role)
    if sample_ids.shape[0] != data.shape[0]:
        raise ValueError(f"{sample_ids.shape[0]} sample_ids for {data.shape[0]} samples; give one per sample")
    if sample_ids.device != data.device:
        raise ValueError(f"sample_ids are on {sample_ids.device}, the samples on {data.device}; move one to the other")


def check_gram(gram: Tensor) -> None:
    """Check for float64 [3], as `gradient_gram` returns it."""
    if gram.shape != (3,) or gram.dtype != torch.float64:
        raise ValueError(f"gram is {gram.dtype} with shape {tuple(gram.shape)}; pass what gradient_gram returned")


def check_max_norm(max_norm: float | None) -> None:
    """Check for a positive norm, or None for no clipping."""
    if max_norm is not None and not max_norm > 0.0:
        raise ValueError(f"max_norm is {max_norm}; it must be positive, or None for no clipping")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")
