"""Batches as mappings of tensors, their micro-batches, and the call of a denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""``"sample"``: clean data x_0 [B, ...]. ``"sample_ids"`` (optional): int64 [B], the samples' slots in the global
batch, from which noise and timesteps are drawn; without it, rank B + 0..B-1. Every other entry has a
leading dimension B and is a keyword of the model's forward, such as ``"class_labels"``."""

RESERVED = frozenset({"sample", "sample_ids"})


class Denoiser(Protocol):
    """The call of a model.

    Args:
        model: the network, whatever wraps it.
        noisy_sample: x_t [B, ...].
        timesteps: [B], what the model is told about each timestep (``Process.conditioning``).
        condition: the batch's other entries, each [B, ...].

    Returns:
        The prediction, [B, ...] like ``noisy_sample``.
    """

    def __call__(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor: ...


def diffusers_denoiser(model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
    """Call a diffusers UNet: ``model(sample, timestep, **condition)``; see ``Denoiser``."""
    prediction: Tensor = model(noisy_sample, timesteps, **condition, return_dict=False)[0]
    return prediction


def condition_of(batch: Batch) -> dict[str, Tensor]:
    """The entries of ``batch`` that the model's forward takes as keywords."""
    return {name: value for name, value in batch.items() if name not in RESERVED}


def with_sample_ids(batch: Batch, rank: int = 0) -> dict[str, Tensor]:
    """``batch`` with its sample ids filled in.

    Args:
        batch: this process's part of the global batch.
        rank: this process's; without ids, the samples are numbered rank B + 0..B-1.

    Raises:
        ValueError: for a batch without ``"sample"``, without samples, or with entries of another leading dimension.
    """
    if "sample" not in batch:
        raise ValueError(f'a batch needs the entry "sample" (x_0 [B, ...]), got {sorted(batch)}')
    sample = batch["sample"]
    if sample.shape[0] == 0:
        raise ValueError("a batch needs at least one sample, got none")
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


def micro_batches(batch: Batch, count: int = 1, rank: int = 0) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Cut ``batch`` into micro-batches whose weighted losses sum to the batch's mean loss.

    Args:
        batch: this process's part of the global batch, B samples.
        count: the most parts; they are consecutive and of nearly equal size.
        rank: as in ``with_sample_ids``.

    Returns:
        (part, weight) of each micro-batch of b samples: a batch with sample ids, and float32 [b] filled with 1 / B.

    Raises:
        ValueError: as ``with_sample_ids``.
    """
    batch = with_sample_ids(batch, rank)
    sample = batch["sample"]
    weight = torch.full((sample.shape[0],), 1 / sample.shape[0], device=sample.device)
    chunks: Mapping[str, Sequence[Any]] = {name: value.chunk(count) for name, value in batch.items()}
    parts = [dict(zip(chunks, values, strict=True)) for values in zip(*chunks.values(), strict=True)]
    return [(part, weight[: part["sample"].shape[0]]) for part in parts]
