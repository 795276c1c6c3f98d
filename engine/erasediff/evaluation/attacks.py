"""Attacks on unlearned models: prompt search (UnlearnDiffAtk, arXiv 2310.11868), textual inversion, relearning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch, Denoiser, diffusers_denoiser, micro_batches
from erasediff.diffusion.losses import DenoisingObjective
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import noise_key
from erasediff.errors import UserError
from erasediff.methods import FineTune
from erasediff.models.base import LatentModel
from erasediff.models.text_tokens import (
    EncoderTokens,
    check_word,
    hook_token_embeddings,
    positions_of,
    text_encoders,
)
from erasediff.training.loop import Batches
from erasediff_kernels import ConstrainedAdamW

WordVectors = Mapping[str, Tensor]
"""Embeddings of a word's tokens by text encoder, float32 [K, D] each: of its last K tokens."""


def condition(model: LatentModel, prompt: str, latents: Tensor) -> dict[str, Tensor]:
    """Condition of one prompt for each of ``latents`` [N, C, h, w], with gradients."""
    return for_latents(model, model.embed_prompts([prompt]), latents)


def for_latents(model: LatentModel, text: Mapping[str, Tensor], latents: Tensor) -> dict[str, Tensor]:
    """One prompt's embeddings [1, ...] for each of ``latents`` [N, C, h, w], with what else the network is told."""
    count, size = len(latents), (latents.shape[-2] * model.latent_scale, latents.shape[-1] * model.latent_scale)
    repeated = {name: value.expand(count, *value.shape[1:]) for name, value in text.items()}
    return repeated | model.size_condition(size, (0, 0), size, count)


def single_token(encoder: EncoderTokens, word: str) -> int:
    """Token id of a word. UserError if it is several tokens, which one exchange cannot replace."""
    ids = encoder.word(word)
    if len(ids) != 1:
        raise UserError(f'"{word}" is {len(ids)} tokens to the {encoder.name}: choose a word that is one.')
    return ids[0]


def single_token_words(model: LatentModel, *, shortest: int = 3) -> list[str]:
    """Words of letters that are one token to every text encoder, in alphabetical order."""
    first, *others = text_encoders(model)
    ends = (token.removesuffix("</w>").removeprefix("▁") for token in first.tokenizer.get_vocab())
    words = sorted({word for word in ends if word.isascii() and word.isalpha() and len(word) >= shortest})
    return [word for word in words if all(len(encoder.word(word)) == 1 for encoder in (first, *others))]


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
    With several text encoders, the gradients of all add up.

    Args:
        model: The attacked model; its denoiser is frozen and set to evaluation mode.
        latents: [N, C, h, w] of the concept's images; steps take them in turn.
        vocabulary: Words of one token each, without the concept's own.
        batch_size: Images per step.
        seed: Seed of the first words and of the noise.

    Raises:
        UserError: A word of the vocabulary is several tokens to a text encoder.
    """

    def __init__(
        self, model: LatentModel, latents: Tensor, vocabulary: Sequence[str], *, batch_size: int = 32, seed: int = 0
    ) -> None:
        self.model, self.latents, self.vocabulary, self.seed = model, latents, list(vocabulary), seed
        self.encoders = text_encoders(model)
        self.tokens = {
            encoder.name: torch.tensor([single_token(encoder, word) for word in vocabulary], device=model.device)
            for encoder in self.encoders
        }
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
        leaves: dict[str, Tensor] = {}

        def leaf(encoder: str, ids: Tensor, output: Tensor) -> Tensor:
            leaves[encoder] = output.detach().requires_grad_()
            return leaves[encoder]

        with hook_token_embeddings(self.model, leaf):
            self._true_loss(self._typed(chosen, prompt), step, backward=True)
        change = torch.zeros(len(self.vocabulary), device=self.model.device)
        for encoder in self.encoders:
            gradient = leaves[encoder.name].grad
            if gradient is not None:
                change += encoder.weight[self.tokens[encoder.name]].float() @ gradient[0, encoder.first + slot].float()
        order: list[int] = change.argsort().tolist()
        return order

    @torch.no_grad()
    def _loss(self, prompt: str, step: int) -> float:
        return float(self._true_loss(prompt, step, backward=False))

    def _true_loss(self, prompt: str, step: int, *, backward: bool) -> Tensor:
        count = len(self.slots)
        latents = self.latents[(self.slots + step * count) % len(self.latents)]
        batch = {"sample": latents, "sample_ids": self.slots, **condition(self.model, prompt, latents)}
        [(micro_batch, weight)] = micro_batches(batch)
        key = noise_key(self.seed, step, self.model.device)
        loss = self.objective.retain_loss(self.network, micro_batch, weight, key=key)
        if backward:
            torch.autograd.backward(loss)
        return loss.detach()


def textual_inversion(
    model: LatentModel,
    latents: Tensor,
    prompt: str,
    word: str,
    *,
    start: str | None = None,
    tokens: Literal["last", "all"] = "last",
    steps: int = 200,
    lr: float = 5e-3,
    batch_size: int = 16,
    seed: int = 0,
) -> WordVectors:
    """Textual inversion (Gal et al. 2022): learn embeddings of ``word`` under which ``latents`` are denoised.

    On an unlearned model this is the attack CCE (Pham et al. 2023, arXiv 2308.01508), which shows a concept that is
    hidden, not gone. All text encoders are attacked together. No weight changes.

    Args:
        model: The attacked model; its denoiser is frozen and set to evaluation mode.
        latents: [N, C, h, w] of the concept's images.
        prompt: Prompt that holds ``word``.
        word: Word whose embeddings are learned.
        start: Word whose embeddings are the first values; None for those of ``word``.
        tokens: Whether the last token of the word is learned, or all of them.
        steps: Steps of Adam.
        lr: Learning rate.
        batch_size: Images per step.
        seed: Seed of the noise.

    Raises:
        UserError: ``word`` does not stand in ``prompt``.
    """
    check_word(model, word, prompt)
    network = model.denoiser.requires_grad_(False).eval()
    objective = DenoisingObjective(process=model.process.to(model.device), denoiser=model.predict)
    vectors = {
        encoder.name: _first_vectors(encoder, word, start, tokens).requires_grad_() for encoder in text_encoders(model)
    }
    optimizer = torch.optim.Adam(list(vectors.values()), lr)
    slots = torch.arange(batch_size, device=model.device)
    for step in range(steps):
        batch_latents = latents[(slots + step * batch_size) % len(latents)]
        optimizer.zero_grad()
        with in_place_of(model, word, vectors):
            batch = {"sample": batch_latents, "sample_ids": slots, **condition(model, prompt, batch_latents)}
            [(micro_batch, weight)] = micro_batches(batch)
            key = noise_key(seed, step, model.device)
            torch.autograd.backward(objective.retain_loss(network, micro_batch, weight, key=key))
        optimizer.step()
    return {name: vector.detach() for name, vector in vectors.items()}


def _first_vectors(encoder: EncoderTokens, word: str, start: str | None, tokens: Literal["last", "all"]) -> Tensor:
    """float32 [K, D]: embeddings of the learned tokens of ``word``, or of the last ones of ``start``."""
    count = 1 if tokens == "last" else len(encoder.word(word))
    ids = encoder.word(word if start is None else start)
    if not ids:
        raise UserError(f'The {encoder.name} reads no token in the word "{start}": start from another.')
    # A start of fewer tokens repeats its first one.
    ids = [ids[0]] * (count - len(ids)) + ids[-count:]
    return encoder.weight[torch.tensor(ids, device=encoder.weight.device)].detach().float().clone()


@contextmanager
def in_place_of(model: LatentModel, word: str, vectors: WordVectors) -> Iterator[None]:
    """Replace the embeddings of the last tokens of ``word`` by ``vectors`` in every prompt, within the block."""
    ids_of = {encoder.name: encoder.word(word) for encoder in text_encoders(model)}

    def embed(encoder: str, ids: Tensor, output: Tensor) -> Tensor:
        learned = vectors[encoder]
        places = positions_of(ids, ids_of[encoder])[..., -len(learned) :]
        for place, vector in enumerate(learned):
            output = torch.where(places[..., place, None], vector.to(output.dtype), output)
        return output

    with hook_token_embeddings(model, embed):
        yield


@dataclass(frozen=True, slots=True)
class RepeatedBatches:
    """Batches of the same few images, in turn.

    Attributes:
        samples: [N, ...], as the denoiser takes them.
        condition: Of each image, tensors [N, ...].
        batch_size: Images per step.
    """

    samples: Tensor
    condition: Mapping[str, Tensor]
    batch_size: int

    def at(self, step: int) -> Batch:
        """Batch of a step."""
        slots = torch.arange(self.batch_size, device=self.samples.device)
        rows = (slots + step * self.batch_size) % len(self.samples)
        condition = {name: value[rows] for name, value in self.condition.items()}
        return {"sample": self.samples[rows], "sample_ids": slots, **condition}


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

    All weights that take gradients are trained by AdamW at a constant ``lr``, without averaging: the attacker has the
    weights and some images. A concept that is slow to return was not merely hidden; the reference is the curve of a
    model that never saw the images.

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
    optimizer = ConstrainedAdamW([weight for weight in network.parameters() if weight.requires_grad], lr)
    method = FineTune(network, optimizer, process=process, denoiser=denoiser, seed=seed)
    curve = [(0, measure())]
    for step in range(steps[-1]):
        method.step(batches.at(step))
        if step + 1 in steps:
            curve.append((step + 1, measure()))
    return curve
