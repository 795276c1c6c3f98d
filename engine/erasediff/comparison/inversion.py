"""A vector that means again what the word no longer does (textual inversion; CCE, arXiv 2308.01508)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from erasediff.comparison.words import condition, embedded_by, embeddings, token_ids, word_id
from erasediff.models.sd import StableDiffusion
from erasediff.objectives import DenoisingObjective
from erasediff.process import NoiseRole, noise_key


def inverted_word(
    model: StableDiffusion,
    latents: Tensor,
    prompt: str,
    word: str,
    *,
    steps: int = 200,
    lr: float = 5e-3,
    batch_size: int = 16,
    seed: int = 0,
) -> Tensor:
    """float32 [D]: of all embeddings of ``word``, which ``prompt`` holds, one under which ``latents`` are denoised.

    Gal et al. 2022 on an unlearned model, which is how CCE shows a concept that is hidden, not gone: no weight changes,
    only the vector, from the word's own embedding on, by Adam on the denoising loss of images [N, C, h, w] of it.
    UserError for a word of several tokens, ValueError for one that is not in the prompt.
    """
    token, ids = word_id(model, word), token_ids(model, prompt)
    if token not in ids:
        raise ValueError(f'"{word}" is not in the prompt "{prompt}"')
    network = model.denoiser_module.requires_grad_(False).eval()
    objective = DenoisingObjective(process=model.process.to(model.device), denoiser=model.denoiser)
    vector = embeddings(model)[token].detach().float().clone().requires_grad_()
    optimizer = torch.optim.Adam([vector], lr)
    slots = torch.arange(batch_size, device=model.device)
    for step in range(steps):
        rows = (slots + step * batch_size) % len(latents)
        optimizer.zero_grad()
        with in_place_of(model, word, vector):
            batch = {"sample": latents[rows], "sample_ids": slots, **condition(model, ids, batch_size)}
            objective.true_loss(
                network,
                batch,
                noise_key(seed, step, model.device),
                torch.Tensor.backward,
                noise=NoiseRole.RETAIN_NOISE,
                timestep=NoiseRole.RETAIN_TIMESTEP,
            )
        optimizer.step()
    return vector.detach()


@contextmanager
def in_place_of(model: StableDiffusion, word: str, vector: Tensor) -> Iterator[None]:
    """Within the block, ``vector`` [D] is the embedding of ``word`` in every prompt."""
    token = word_id(model, word)
    with embedded_by(
        model, lambda ids, output: torch.where((ids == token).unsqueeze(-1), vector.to(output.dtype), output)
    ):
        yield
