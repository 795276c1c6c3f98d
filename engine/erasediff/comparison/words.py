"""What a prompt's tokens are to a CLIP text encoder, open to gradients and to vectors in the place of words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from erasediff.errors import UserError
from erasediff.models.sd import StableDiffusion

Embedded = Callable[[Tensor, Tensor], Tensor]
"""(token ids int64 [B, L], their embeddings [B, L, D]) -> the embeddings to use instead."""


def token_ids(model: StableDiffusion, prompt: str) -> Tensor:
    """int64 [1, L], padded to the text encoder's length."""
    tokenizer: Any = model.tokenizers["tokenizer"]
    length = tokenizer.model_max_length
    ids: Tensor = tokenizer(
        prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids.to(model.device)


def word_id(model: StableDiffusion, word: str) -> int:
    """The token that ``word`` is. UserError if it is several: one vector could not stand in its place."""
    tokenizer: Any = model.tokenizers["tokenizer"]
    ids: list[int] = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise UserError(f'"{word}" is {len(ids)} tokens to this text encoder: choose a word that is one.')
    return ids[0]


def embeddings(model: StableDiffusion) -> Tensor:
    """[V, D], the text encoder's own of every token."""
    encoder: Any = model.encoders["text_encoder"]
    weight: Tensor = encoder.get_input_embeddings().weight
    return weight


def condition(model: StableDiffusion, ids: Tensor, count: int) -> Mapping[str, Tensor]:
    """The condition of one prompt [1, L], for ``count`` samples; unlike ``encode_prompts``, autograd sees it."""
    encoder: Any = model.encoders["text_encoder"]
    text: Tensor = encoder(ids)[0]
    return {"encoder_hidden_states": text.expand(count, -1, -1)}


@contextmanager
def embedded_by(model: StableDiffusion, embed: Embedded) -> Iterator[None]:
    """Within the block, token embeddings pass through ``embed``, whoever encodes a prompt: sampling, too."""
    encoder: Any = model.encoders["text_encoder"]
    handle = encoder.get_input_embeddings().register_forward_hook(lambda _, inputs, output: embed(inputs[0], output))
    try:
        yield
    finally:
        handle.remove()
