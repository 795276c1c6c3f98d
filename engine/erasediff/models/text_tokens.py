"""Tokens of a prompt in every text encoder of a model, and their embeddings: what textual inversion changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erasediff.errors import UserError
from erasediff.models.base import LatentModel

Embedded = Callable[[str, Tensor, Tensor], Tensor]
"""Function of an encoder's name, token ids int64 [B, L] and their embeddings [B, L, D] that returns the embeddings to
use instead."""


@dataclass(frozen=True, slots=True)
class EncoderTokens:
    """Tokenizer and token embeddings of one text encoder.

    Attributes:
        name: Component of the encoder, such as "text_encoder_2".
        tokenizer: Its tokenizer, of transformers.
        tables: Modules that hold its token embeddings; T5 has two of one weight, and calls one.
    """

    name: str
    tokenizer: Any
    tables: tuple[nn.Embedding, ...]

    @property
    def weight(self) -> Tensor:
        """Token embeddings [V, D]."""
        return self.tables[0].weight

    def ids(self, prompt: str) -> Tensor:
        """Token ids of a prompt, int64 [1, L], padded to the tokenizer's length."""
        ids: Tensor = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids.to(self.weight.device)

    def word(self, word: str) -> list[int]:
        """Token ids of a word, without those that begin and end a prompt."""
        ids: list[int] = self.tokenizer(word, add_special_tokens=False).input_ids
        return ids

    def room(self, prompt: str) -> int:
        """Tokens that can be put before a prompt without cutting its end off; negative where it is cut already."""
        ids: list[int] = self.tokenizer(prompt).input_ids
        room: int = self.tokenizer.model_max_length - len(ids)
        return room

    @property
    def first(self) -> int:
        """Number of tokens before the first of a prompt's own."""
        own = self.word("a")
        ids: list[int] = self.tokenizer("a").input_ids
        return ids.index(own[0])


def text_encoders(model: LatentModel) -> list[EncoderTokens]:
    """Tokens of each text encoder of ``model``, in the order of its components."""
    encoders = []
    for name in model.encoder_names:
        encoder: Any = model.encoders[name]
        tokenizer = model.tokenizers[name.replace("text_encoder", "tokenizer")]
        weight = encoder.get_input_embeddings().weight
        tables = [
            module for module in encoder.modules() if isinstance(module, nn.Embedding) and module.weight is weight
        ]
        encoders.append(EncoderTokens(name, tokenizer, tuple(tables)))
    return encoders


def positions_of(ids: Tensor, word: Sequence[int]) -> Tensor:
    """Mask bool [B, L, K] of the places in ``ids`` [B, L] where token k of ``word`` (K ids) stands, as one of a run."""
    length, count = len(word), ids.shape[1]
    found = torch.zeros(*ids.shape, length, dtype=torch.bool, device=ids.device)
    if length > count:
        return found
    sought = torch.tensor(list(word), device=ids.device)
    runs = (ids.unfold(1, length, 1) == sought).all(-1)
    for place in range(length):
        found[:, place : place + runs.shape[1], place] |= runs
    return found


def check_word(model: LatentModel, word: str, prompt: str) -> None:
    """Raise UserError for a word that is not in a prompt as the text encoders read it."""
    for encoder in text_encoders(model):
        ids = encoder.word(word)
        if not ids or not positions_of(encoder.ids(prompt), ids).any():
            raise UserError(
                f'The {encoder.name} finds no word "{word}" in the prompt "{prompt}": choose one that stands in it, '
                "with spaces around it."
            )


@contextmanager
def hook_token_embeddings(model: LatentModel, embed: Embedded) -> Iterator[None]:
    """Pass token embeddings through ``embed`` within the block, wherever a prompt is encoded, sampling included."""

    def hook(name: str) -> Callable[[Any, Any, Tensor], Tensor]:
        return lambda _, inputs, output: embed(name, inputs[0], output)

    with ExitStack() as stack:
        for encoder in text_encoders(model):
            for table in encoder.tables:
                stack.callback(table.register_forward_hook(hook(encoder.name)).remove)
        yield
