"""Attacks on unlearned models: prompt search (UnlearnDiffAtk, arXiv 2310.11868), textual inversion, relearning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Denoiser, diffusers_denoiser, micro_batches
from erasediff.diffusion.losses import DenoisingObjective
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import noise_key
from erasediff.errors import UserError
from erasediff.methods import FineTune
from erasediff.models.stable_diffusion import StableDiffusion
from erasediff.training.loop import Batches
from erasediff_kernels import ConstrainedAdamW

Embedded = Callable[[Tensor, Tensor], Tensor]
"""Function of token ids int64 [B, L] and their embeddings [B, L, D] that returns the embeddings to use instead."""


def token_ids(model: StableDiffusion, prompt: str) -> Tensor:
    """Token ids of a prompt, int64 [1, L], padded to the text encoder's length."""
    tokenizer: Any = model.tokenizers["tokenizer"]
    length = tokenizer.model_max_length
    ids: Tensor = tokenizer(
        prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids.to(model.device)


def word_id(model: StableDiffusion, word: str) -> int:
    """Token id of a word. UserError if it is several tokens, which one vector cannot replace."""
    tokenizer: Any = model.tokenizers["tokenizer"]
    ids: list[int] = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise UserError(f'"{word}" is {len(ids)} tokens to this text encoder: choose a word that is one.')
    return ids[0]


def embeddings(model: StableDiffusion) -> Tensor:
    """Token embeddings of the text encoder, [V, D]."""
    encoder: Any = model.encoders["text_encoder"]
    weight: Tensor = encoder.get_input_embeddings().weight
    return weight


def condition(model: StableDiffusion, ids: Tensor, count: int) -> Mapping[str, Tensor]:
    """Differentiable condition of one prompt [1, L] for ``count`` samples; ``encode_prompts`` has no gradients."""
    encoder: Any = model.encoders["text_encoder"]
    text: Tensor = encoder(ids)[0]
    return {"encoder_hidden_states": text.expand(count, -1, -1)}


@contextmanager
def hook_token_embeddings(model: StableDiffusion, embed: Embedded) -> Iterator[None]:
    """Pass token embeddings through ``embed`` within the block, wherever a prompt is encoded, sampling included."""
    encoder: Any = model.encoders["text_encoder"]
    handle = encoder.get_input_embeddings().register_forward_hook(lambda _, inputs, output: embed(inputs[0], output))
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True, slots=True)
class Found:
    """Result of a prompt search.

    Attributes:
        prompt: The attacked prompt.
        loss: Its denoising loss.
        unattacked_loss: Loss of the prompt without an attack, on the same images, timesteps and noise.
    """

    prompt: str
    loss: float
    unattacked_loss: float


class PromptSearch:
    """Adversarial prompt search: words before a prompt that minimise the denoising loss of the forgotten concept.

    As in UnlearnDiffAtk (arXiv 2310.11868), a few words are put before the prompt, and the loss is that of predicting
    the noise of images of the concept; no other model is needed. There the words are relaxed and projected; here each
    step exchanges one word for the best of a few candidates that the gradient proposes (HotFlip, Ebrahimi et al. 2018;
    GCG, Zou et al. 2023), so every intermediate prompt can be typed. A prompt that the search misses may still exist.

    Args:
        model: The attacked model; its denoiser is frozen and set to evaluation mode.
        latents: [N, C, h, w] of the concept's images; steps take them in turn.
        vocabulary: Words of one token each, without the concept's own.
        batch_size: Images per step.
        seed: Seed of the first words and of the noise.

    Raises:
        UserError: A word of the vocabulary is several tokens.
    """

    def __init__(
        self, model: StableDiffusion, latents: Tensor, vocabulary: Sequence[str], *, batch_size: int = 32, seed: int = 0
    ) -> None:
        self.model, self.latents, self.vocabulary, self.seed = model, latents, list(vocabulary), seed
        self.tokens = torch.tensor([word_id(model, word) for word in vocabulary], device=model.device)
        self.network = model.denoiser.requires_grad_(False).eval()
        self.objective = DenoisingObjective(process=model.process.to(model.device), denoiser=model.predict)
        self.slots = torch.arange(min(batch_size, len(latents)), device=model.device)

    def search(self, prompt: str, *, words: int = 3, steps: int = 30, candidates: int = 8) -> Found:
        """Search from random words; return the best prompt on images that no step was selected by.

        Args:
            prompt: The prompt to attack.
            words: Number of words before it.
            steps: Number of exchanges of one word.
            candidates: Words tried per exchange.
        """
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randint(len(self.vocabulary), (words,), generator=generator).tolist()
        visited = {tuple(chosen)}
        for step in range(steps):
            slot = step % words
            proposed = self._proposed(chosen, slot, prompt, step)[:candidates]
            trials = [chosen, *([*chosen[:slot], number, *chosen[slot + 1 :]] for number in proposed)]
            chosen = min(trials, key=lambda trial: self._loss(self._typed(trial, prompt), step))
            visited.add(tuple(chosen))
        best = min(sorted(visited), key=lambda trial: self._loss(self._typed(trial, prompt), steps))
        attacked = self._typed(best, prompt)
        return Found(attacked, self._loss(attacked, steps), self._loss(prompt, steps))

    def _typed(self, chosen: Sequence[int], prompt: str) -> str:
        return " ".join([*(self.vocabulary[number] for number in chosen), prompt])

    def _proposed(self, chosen: Sequence[int], slot: int, prompt: str, step: int) -> list[int]:
        """Indices of all words, in the order of the first-order change of the loss at ``slot``."""
        leaves: list[Tensor] = []

        def leaf(ids: Tensor, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        with hook_token_embeddings(self.model, leaf):
            self._true_loss(self._typed(chosen, prompt), step, backward=True)
        gradient = leaves[0].grad
        assert gradient is not None
        # The first token is the one that begins every prompt.
        of_slot = gradient[0, 1 + slot]
        order: list[int] = (embeddings(self.model)[self.tokens] @ of_slot).argsort().tolist()
        return order

    @torch.no_grad()
    def _loss(self, prompt: str, step: int) -> float:
        return float(self._true_loss(prompt, step, backward=False))

    def _true_loss(self, prompt: str, step: int, *, backward: bool) -> Tensor:
        count = len(self.slots)
        rows = (self.slots + step * count) % len(self.latents)
        batch = {
            "sample": self.latents[rows],
            "sample_ids": self.slots,
            **condition(self.model, token_ids(self.model, prompt), count),
        }
        [(micro_batch, weight)] = micro_batches(batch)
        key = noise_key(self.seed, step, self.model.device)
        loss = self.objective.retain_loss(self.network, micro_batch, weight, key=key)
        if backward:
            torch.autograd.backward(loss)
        return loss.detach()


def textual_inversion(
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
    """Textual inversion (Gal et al. 2022): learn an embedding of ``word`` under which ``latents`` are denoised.

    On an unlearned model this is the attack CCE, which shows a concept that is hidden, not gone. No weight changes.

    Args:
        model: The attacked model; its denoiser is frozen and set to evaluation mode.
        latents: [N, C, h, w] of the concept's images.
        prompt: Prompt that holds ``word``.
        word: Word of one token, whose embedding is the first value.
        steps: Steps of Adam.
        lr: Learning rate.
        batch_size: Images per step.
        seed: Seed of the noise.

    Returns:
        float32 [D], the embedding.

    Raises:
        UserError: ``word`` is several tokens.
        ValueError: ``word`` is not in ``prompt``.
    """
    token, ids = word_id(model, word), token_ids(model, prompt)
    if token not in ids:
        raise ValueError(f'"{word}" is not in the prompt "{prompt}"')
    network = model.denoiser.requires_grad_(False).eval()
    objective = DenoisingObjective(process=model.process.to(model.device), denoiser=model.predict)
    vector = embeddings(model)[token].detach().float().clone().requires_grad_()
    optimizer = torch.optim.Adam([vector], lr)
    slots = torch.arange(batch_size, device=model.device)
    for step in range(steps):
        rows = (slots + step * batch_size) % len(latents)
        optimizer.zero_grad()
        with in_place_of(model, word, vector):
            batch = {"sample": latents[rows], "sample_ids": slots, **condition(model, ids, batch_size)}
            [(micro_batch, weight)] = micro_batches(batch)
            key = noise_key(seed, step, model.device)
            torch.autograd.backward(objective.retain_loss(network, micro_batch, weight, key=key))
        optimizer.step()
    return vector.detach()


@contextmanager
def in_place_of(model: StableDiffusion, word: str, vector: Tensor) -> Iterator[None]:
    """Replace the embedding of ``word`` by ``vector`` [D] in every prompt, within the block."""
    token = word_id(model, word)
    with hook_token_embeddings(
        model, lambda ids, output: torch.where((ids == token).unsqueeze(-1), vector.to(output.dtype), output)
    ):
        yield


def relearning_curve(
    network: nn.Module,
    process: Process,
    batches: Batches,
    measure: Callable[[], float],
    *,
    steps: Sequence[int],
    lr: float,
    denoiser: Denoiser = diffusers_denoiser,
    seed: int = 0,
) -> list[tuple[int, float]]:
    """Relearning attack: measure a network before and during fine-tuning on the forgotten data.

    All weights are trained by AdamW at a constant ``lr``, without averaging: the attacker has the weights and some
    images. A concept that is slow to return was not merely hidden; the reference is the curve of a model that never saw
    the images.

    Args:
        network: Changed in place.
        process: Noise schedule and prediction type.
        batches: Batches to fine-tune on.
        measure: Called without arguments at each measured step.
        steps: Steps to measure after, positive and ascending.
        lr: Learning rate.
        denoiser: How the network is called.
        seed: Seed of the noise.

    Returns:
        (step, measurement) pairs, step 0 first.

    Raises:
        ValueError: ``steps`` is empty, not positive or not ascending.
    """
    if list(steps) != sorted(set(steps)) or not steps or steps[0] < 1:
        raise ValueError(f"steps must be positive and ascending, got {list(steps)}")
    optimizer = ConstrainedAdamW(network.parameters(), lr)
    method = FineTune(network, optimizer, process=process, denoiser=denoiser, seed=seed)
    curve = [(0, measure())]
    for step in range(steps[-1]):
        method.step(batches.at(step))
        if step + 1 in steps:
            curve.append((step + 1, measure()))
    return curve
