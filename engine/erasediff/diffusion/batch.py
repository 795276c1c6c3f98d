"""A batch is a mapping of tensors, and a model is anything that turns one into a prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""``"sample"``: clean data x_0 [B, ...]. ``"sample_ids"`` (optional): int64 [B], the samples' slots in the global
batch, from which noise and timesteps are drawn; without it, rank B + 0..B-1. Every other entry has a
leading dimension B and is a keyword of the model's forward, such as ``"class_labels"``."""

RESERVED = frozenset({"sample", "sample_ids"})


class Denoiser(Protocol):
    """Calls a model: prediction [B, ...] from x_t [B, ...], the timesteps' conditioning [B] and the condition."""

    def __call__(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor: ...


def diffusers_denoiser(model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
    """The call that diffusers' UNets share: ``model(sample, timestep, **condition)``."""
    prediction: Tensor = model(noisy_sample, timesteps, **condition, return_dict=False)[0]
    return prediction


def condition_of(batch: Batch) -> dict[str, Tensor]:
    """The entries of ``batch`` that the model's forward takes as keywords."""
    return {name: value for name, value in batch.items() if name not in RESERVED}


def with_sample_ids(batch: Batch, rank: int = 0) -> dict[str, Tensor]:
    """``batch``, the part of process ``rank``, with its sample ids filled in.

    Raises ``ValueError`` for a batch without ``"sample"`` or with entries of another leading dimension.
    """
    if "sample" not in batch:
        raise ValueError(f'a batch needs the entry "sample" (x_0 [B, ...]), got {sorted(batch)}')
    sample = batch["sample"]
    for name, value in batch.items():
        if value.ndim == 0 or value.shape[0] != sample.shape[0]:
            raise ValueError(
                f"{name!r} has shape {tuple(value.shape)}, but the batch holds {sample.shape[0]} samples: its first "
                "dimension must be that"
            )
    ids = batch.get("sample_ids")
    if ids is None:
        # Parts of one size, one after the other: no two processes draw the same noise.
        ids = torch.arange(sample.shape[0], device=sample.device) + rank * sample.shape[0]
    return {**batch, "sample_ids": ids}


def micro_batches(batch: Batch, count: int) -> Iterator[dict[str, Tensor]]:
    """``batch`` in at most ``count`` consecutive parts of nearly equal size."""
    chunks: Mapping[str, Sequence[Any]] = {name: value.chunk(count) for name, value in batch.items()}
    for values in zip(*chunks.values(), strict=True):
        yield dict(zip(chunks, values, strict=True))
