"""Latents and embeddings of a model's encoders, refused by the name of the image or prompt where not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from erasediff.data.encoders import PromptEncoder
from erasediff.errors import UserError
from erasediff.utils.finite import first_row_not_finite


def check_latents(latents: Mapping[str, Tensor], images: Sequence[object]) -> None:
    """UserError for the first of ``images``, by their paths, whose latents, rows of [N, ...], are not finite."""
    if (row := first_row_not_finite(latents)) is not None:
        raise UserError(
            f"The latents of the image {images[row]} hold NaN or infinity: the VAE is damaged or overflows; give "
            "a model with another VAE, or leave the image out."
        )


def check_embeddings(embeddings: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
    """UserError for the first of ``prompts`` whose embeddings, rows of tensors [N, ...], are not finite."""
    if (row := first_row_not_finite(embeddings)) is not None:
        raise UserError(
            f"The embeddings of the prompt {prompts[row]!r} hold NaN or infinity: the text encoders are damaged or "
            "overflow; give a model with others."
        )


def encode_prompts(model: PromptEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
    """``model.encode_prompts``, checked by ``check_embeddings``."""
    embeddings = model.encode_prompts(list(prompts))
    check_embeddings(embeddings, prompts)
    return embeddings
