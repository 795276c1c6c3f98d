"""Words that bring back what a model has forgotten: a search over prompts (after UnlearnDiffAtk, arXiv 2310.11868)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erasediff.comparison.words import condition, embedded_by, embeddings, token_ids, word_id
from erasediff.models.sd import StableDiffusion
from erasediff.objectives import DenoisingObjective
from erasediff.process import NoiseRole, noise_key


@dataclass(frozen=True, slots=True)
class Found:
    """``prompt`` and its loss, beside that of the prompt without an attack; on the same images, timesteps and noise."""

    prompt: str
    loss: float
    unattacked_loss: float


class PromptSearch:
    """The words before a prompt under which the model denoises images of the forgotten concept best.

    As UnlearnDiffAtk, a few words are put before the prompt, and the loss is that of predicting the noise of images of
    the concept; no other model is needed. There the words are relaxed and projected; here each step exchanges one word
    for the best of a few ``candidates`` that the gradient proposes (HotFlip, Ebrahimi et al. 2018; GCG, Zou et al.
    2023), so every prompt on the way is one that can be typed. What the search cannot find may still exist.

    latents:    [N, C, h, w] of the concept's images, those of a step in turn
    vocabulary: words of one token each; without the concept's own, or the search is none
    """

    def __init__(
        self, model: StableDiffusion, latents: Tensor, vocabulary: Sequence[str], *, batch_size: int = 32, seed: int = 0
    ) -> None:
        self.model, self.latents, self.vocabulary, self.seed = model, latents, list(vocabulary), seed
        self.tokens = torch.tensor([word_id(model, word) for word in vocabulary], device=model.device)
        self.network = model.denoiser_module.requires_grad_(False).eval()
        self.objective = DenoisingObjective(process=model.process.to(model.device), denoiser=model.denoiser)
        self.slots = torch.arange(min(batch_size, len(latents)), device=model.device)

    def search(self, prompt: str, *, words: int = 3, steps: int = 30, candidates: int = 8) -> Found:
        """Begins with ``words`` drawn from the vocabulary; the best on images that the steps did not choose by."""
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randint(len(self.vocabulary), (words,), generator=generator).tolist()
        seen = {tuple(chosen)}
        for step in range(steps):
            slot = step % words
            proposed = self._proposed(chosen, slot, prompt, step)[:candidates]
            trials = [chosen, *([*chosen[:slot], number, *chosen[slot + 1 :]] for number in proposed)]
            chosen = min(trials, key=lambda trial: self._loss(self._typed(trial, prompt), step))
            seen.add(tuple(chosen))
        best = min(sorted(seen), key=lambda trial: self._loss(self._typed(trial, prompt), steps))
        attacked = self._typed(best, prompt)
        return Found(attacked, self._loss(attacked, steps), self._loss(prompt, steps))

    def _typed(self, chosen: Sequence[int], prompt: str) -> str:
        return " ".join([*(self.vocabulary[number] for number in chosen), prompt])

    def _proposed(self, chosen: Sequence[int], slot: int, prompt: str, step: int) -> list[int]:
        """Numbers of all words, that of which the loss falls most by its gradient at ``slot`` first."""
        leaves: list[Tensor] = []

        def leaf(ids: Tensor, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        with embedded_by(self.model, leaf):
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
        return self.objective.true_loss(
            self.network,
            batch,
            noise_key(self.seed, step, self.model.device),
            torch.Tensor.backward if backward else None,
            noise=NoiseRole.RETAIN_NOISE,
            timestep=NoiseRole.RETAIN_TIMESTEP,
        )
