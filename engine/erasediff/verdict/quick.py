"""Quick form of a verdict, within a run: whether what the network draws of a concept still shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Denoiser
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.diffusion.trajectories import clean_and_noise
from erasediff.evaluation.diffusion_classifier import DiffusionClassifier
from erasediff.methods.base import Solver
from erasediff.verdict.distance import expanded
from erasediff.verdict.judges.base import Candidate
from erasediff_kernels import philox_noise

SAMPLES, SAMPLING_STEPS, DRAWS = 16, 12, 8
"""Samples of a look, steps of their sampler, and noises of the classifier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickQuestion:
    """What a look asks.

    Attributes:
        sought: Conditions of what should be forgotten.
        others: Conditions that an image is compared under besides.
        null: Condition to guide away from; None for a model without.
        guidance_scale: Scale of classifier-free guidance.
        shape: (C, h, w) of a sample.
    """

    sought: Sequence[Candidate]
    others: Sequence[Candidate]
    null: Mapping[str, Tensor] | None
    guidance_scale: float
    shape: tuple[int, ...]


class QuickLook:
    """Looks at the network of a run with its averaged weights: samples without an autoencoder, judged by the original.

    Each rank makes the same calls, so sharded networks serve as well.

    Args:
        method: Solver whose network is looked at.
        original: The network from before the first step.
        process: Noise schedule and prediction type.
        denoiser: How both are called.
        question: What is asked.
        seed: Of the noise.
        batch_size: Samples per call.
    """

    def __init__(
        self,
        method: Solver,
        original: nn.Module,
        process: Process,
        denoiser: Denoiser,
        question: QuickQuestion,
        *,
        seed: int,
        batch_size: int = SAMPLES,
    ) -> None:
        self.method, self.original, self.process, self.denoiser = method, original, process, denoiser
        self.question, self.seed, self.batch_size = question, seed, batch_size

    @torch.no_grad()
    def recognised(self, number: int) -> float:
        """Share of the samples of look ``number`` that show what is sought, to the original model."""
        question, device = self.question, self.method.device
        with self.method.averaged_weights(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            was_training = self.method.model.training
            self.method.model.eval()
            samples = torch.cat(
                [self._sample(batch, number) for batch in torch.split(torch.arange(SAMPLES), self.batch_size)]
            )
            self.method.model.train(was_training)
        classifier = DiffusionClassifier(
            self.original, self.process, self.denoiser, draws=DRAWS, batch_size=self.batch_size, seed=self.seed + number
        )
        candidates = [*question.sought, *question.others]
        conditions = {
            name: torch.cat([candidate.condition[name] for candidate in candidates]) for name in candidates[0].condition
        }
        answers = classifier.classify(samples.cpu(), conditions)
        return float((answers < len(question.sought)).double().mean())

    def _sample(self, ids: Tensor, number: int) -> Tensor:
        """Samples [B, C, h, w] by DDIM at eta 0 with trailing timesteps, which for flow matching is Euler's."""
        question, device, model = self.question, self.method.device, self.method.model
        process, train_timesteps = self.process.to(device), self.process.num_train_timesteps
        ids = ids.to(device)
        key = noise_key(self.seed, number, device)
        timesteps = (
            train_timesteps - 1 - torch.arange(SAMPLING_STEPS, device=device) * train_timesteps // SAMPLING_STEPS
        )
        sample = process.sigma[timesteps[0]] * philox_noise(ids, key, int(NoiseRole.QUICK_LOOK), question.shape)
        dtype = next(self.original.parameters()).dtype
        asked = [question.sought[int(i) % len(question.sought)] for i in ids.tolist()]
        condition = {name: torch.cat([candidate.condition[name] for candidate in asked]) for name in asked[0].condition}
        condition = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in condition.items()
        }
        null = None if question.null is None else expanded(question.null, len(ids), device, dtype)
        for step, timestep in enumerate(timesteps):
            at = timestep.expand(len(ids))
            prediction = self._predict(model, sample.to(dtype), at, condition)
            if null is not None:
                unconditional = self._predict(model, sample.to(dtype), at, null)
                prediction = torch.lerp(unconditional, prediction, question.guidance_scale)
            clean, noise = clean_and_noise(process, prediction, sample, at)
            if step + 1 == SAMPLING_STEPS:
                return clean
            alpha, sigma = (
                value.view(-1, *(1,) * (sample.ndim - 1))
                for value in process.coefficients(timesteps[step + 1].expand(len(ids)))
            )
            sample = alpha * clean + sigma * noise
        raise AssertionError("a sampler has steps")

    def _predict(self, model: nn.Module, sample: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        with self.method.objective.autocast():
            return self.denoiser(
                model, sample, self.process.conditioning.to(sample.device)[timesteps], condition
            ).float()


class UntilForgotten:
    """Rounds until what is sought is recognised in two looks in a row no more than ``limit`` allows.

    A look follows from the weights, the step and the seed, so a resumed run decides as the uninterrupted one.

    Args:
        look: The look.
        steps: Steps of a round.
        max_steps: Steps that the run takes at most.
        limit: Largest share of samples that show what is sought.
        say: Prints a sentence.
        is_late: Returns true where the time is used up.
    """

    def __init__(
        self,
        look: QuickLook,
        *,
        steps: int,
        max_steps: int,
        limit: float,
        say: Callable[[str], None],
        is_late: Callable[[], bool],
    ) -> None:
        self._look, self._steps, self.max_steps, self._limit = look, steps, max_steps, limit
        self._say, self._is_late = say, is_late

    def goes_on(self, step: int) -> bool:
        """See ``Rounds``."""
        share = 0.0
        for number in (2 * step, 2 * step + 1):
            share = self._look.recognised(number)
            if share > self._limit:
                break
        else:
            return False
        seen = f"After step {step}, {share:.0%} of samples still show what is to be forgotten"
        if step + self._steps > self.max_steps:
            self._say(f"{seen}; that is the last of --max-steps.")
            return False
        if self._is_late():
            self._say(f"{seen}; --max-minutes are over.")
            return False
        self._say(f"{seen}: another {self._steps} steps, at twice the learning rate.")
        return True
