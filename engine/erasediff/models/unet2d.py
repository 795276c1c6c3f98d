"""Denoiser of the families without prompts whose network is diffusers' UNet2DModel."""

from __future__ import annotations

from typing import Any

import torch

from erasediff.errors import UserError
from erasediff.models.family import Subsets

SUBSETS = Subsets(
    cross_attention=frozenset(),
    self_attention=frozenset({"attentions"}),
    keys_and_values=frozenset({"to_k", "to_v"}),
    outermost=("conv_in.", "conv_norm_out.", "conv_out.", "time_embedding.", "class_embedding."),
)
BY_DATA = "timestep"
"""The ``class_embed_type`` that embeds a label like a timestep, so that only data tell how many classes there are."""


def dummy_inputs(
    config: Any, batch_size: int, size: tuple[int, int], dtype: torch.dtype, device: torch.device | str
) -> dict[str, Any]:
    """Keyword arguments of the forward as in ``ModelFamily.dummy_inputs``."""
    inputs = {"sample": torch.zeros(batch_size, config.in_channels, *size, dtype=dtype, device=device)}
    if is_class_conditional(config):
        inputs["class_labels"] = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return inputs


def is_class_conditional(config: Any) -> bool:
    """Whether the network takes class labels."""
    return config.get("num_class_embeds") is not None or config.get("class_embed_type") == BY_DATA


def num_embeddings(config: Any) -> int | None:
    """Number of class embeddings; None for a network without, or one that embeds any number."""
    return None if config.class_embed_type == BY_DATA else config.num_class_embeds


def check_network(source: object, config: Any) -> None:
    """Raise UserError for a kind of UNet2DModel, read from ``source``, that cannot be trained here."""
    if config.class_embed_type not in (None, BY_DATA):
        raise UserError(
            f"The UNet in {source} embeds its classes by class_embed_type {config.class_embed_type!r}, which takes "
            f"vectors in the place of labels: give a UNet with num_class_embeds, or with class_embed_type {BY_DATA!r}."
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise UserError(
            f"The UNet in {source} predicts {config.out_channels} channels of {config.in_channels}-channel samples: "
            "give one that predicts as many, or twice as many with a learned variance."
        )
    if config.sample_size is None:
        raise UserError(f"The UNet in {source} does not say its size: write sample_size into its config.json.")
