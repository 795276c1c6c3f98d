"""Detection of memorised prompts by the magnitude of text-conditional predictions, without training images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.diffusion.trajectories import clean_and_noise
from erasediff.errors import UserError
from erasediff.evaluation.memorization import membership_auc
from erasediff.models.base import LatentModel
from erasediff.models.pipeline import INITIAL_NOISE
from erasediff_kernels import philox_noise

FALSE_POSITIVES = 0.01
"""Share of the control list above the threshold."""


@dataclass(frozen=True)
class PromptMagnitude:
    """Magnitude of text-conditional predictions, averaged over sampling steps and draws of the initial noise.

    |p(x_t, prompt) - p(x_t, empty)| over all elements of a latent, p the network's own prediction, to which
    classifier-free guidance applies; for an epsilon model the metric of Wen et al. (ICLR 2024, "Detecting, Explaining,
    and Mitigating Memorization in Diffusion Models", section 3). A prompt that reproduces a training image is guided
    there from every noise, and strongly from the first step on. As there, the sampler is DDIM (Euler for flow
    matching), here with trailing timesteps. All prompts begin from the same noise, that of the first images of
    ``sample``.

    Attributes:
        model: Model with classifier-free guidance; its denoiser is set to evaluation mode.
        draws: Draws of the initial noise per prompt.
        steps: Sampling steps that are averaged, from the first one on.
        num_inference_steps: Steps of the whole sampler.
        guidance_scale: Scale of the guidance that leads from one step to the next.
        size: (height, width) of the image in pixels.
        seed: Seed of the noise.

    Raises:
        UserError: The model has no unconditional prediction, the sampler more steps than timesteps, or the size is none
            of the model's.
        ValueError: Less than one draw or step, or more steps than the sampler has.
    """

    model: LatentModel
    draws: int
    steps: int
    num_inference_steps: int
    guidance_scale: float
    size: tuple[int, int]
    seed: int

    def __post_init__(self) -> None:
        check_has_null_prediction(self.model)
        if self.draws < 1 or not 1 <= self.steps <= self.num_inference_steps:
            raise ValueError(f"{self.draws} draws, {self.steps} of {self.num_inference_steps} steps")
        self.model.process.check_inference_steps(self.num_inference_steps)
        self.model.latent_shape(*self.size)
        self.model.denoiser.eval()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Magnitudes float32 [N, draws] on the host, all of ``prompts`` in one batch of 2 N draws."""
        model, count = self.model, len(prompts) * self.draws
        process = model.process.to(model.device)
        shape = model.latent_shape(*self.size)
        conditions = {
            **_interleaved(model.encode_prompts(prompts), self._null, self.draws),
            **model.size_condition(self.size, (0, 0), self.size, 2 * count),
        }
        ids = torch.arange(self.draws, device=model.device).repeat(len(prompts))
        sample = philox_noise(ids, noise_key(self.seed, INITIAL_NOISE, model.device), int(NoiseRole.SAMPLING), shape)
        norms = torch.zeros(count, device=model.device)
        for step in range(self.steps):
            timesteps = self._timesteps(step, count)
            twice = process.conditioning[timesteps].repeat(2)
            prediction = model.predict(model.denoiser, torch.cat((sample, sample)), twice, conditions).float()
            conditional, null = prediction.chunk(2)
            norms += (conditional - null).flatten(1).norm(dim=1)
            if step + 1 < self.steps:
                guided = torch.lerp(null, conditional, self.guidance_scale)
                clean, noise = clean_and_noise(process, guided, sample, timesteps)
                alpha, sigma = (c.view(-1, 1, 1, 1) for c in process.coefficients(self._timesteps(step + 1, count)))
                sample = alpha * clean + sigma * noise
        return (norms / self.steps).reshape(len(prompts), self.draws).cpu()

    @cached_property
    def _null(self) -> Mapping[str, Tensor]:
        return self.model.encode_prompts([""])

    def _timesteps(self, step: int, count: int) -> Tensor:
        total = self.model.process.num_train_timesteps
        timestep = total - 1 - step * total // self.num_inference_steps
        return torch.full((count,), timestep, dtype=torch.int64, device=self.model.device)


def _interleaved(given: Mapping[str, Tensor], null: Mapping[str, Tensor], draws: int) -> dict[str, Tensor]:
    """Conditions of ``draws`` samples of each prompt, then of as many samples of the empty one."""
    return {
        name: torch.cat((value.repeat_interleave(draws, 0), null[name].expand(len(value) * draws, *value.shape[1:])))
        for name, value in given.items()
    }


def check_has_null_prediction(model: LatentModel) -> None:
    """Raise UserError for a model without classifier-free guidance."""
    if not model.has_null_prediction:
        raise UserError(
            f"{model.checkpoint.path} has no unconditional prediction to compare with, since its guidance is distilled "
            "into the network: scan a model with classifier-free guidance, such as SD, SDXL or SD3."
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scores of control prompts, which are taken for not memorised.

    Attributes:
        mean: Mean of the scores.
        deviation: Their standard deviation.
        threshold: Score that at most 1% of them exceed.
        count: Number of prompts.
    """

    mean: float
    deviation: float
    threshold: float
    count: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> Calibration:
        """Calibrate by the scores of at least two control prompts. ValueError for fewer."""
        count = len(scores)
        if count < 2:
            raise ValueError(f"a calibration needs at least two control prompts, got {count}")
        mean = math.fsum(scores) / count
        deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (count - 1))
        return cls(mean, deviation, sorted(scores)[count - 1 - int(FALSE_POSITIVES * count)], count)

    def z(self, score: float) -> float:
        """Standard deviations of ``score`` above the mean; nan where the control's scores are all one."""
        return (score - self.mean) / self.deviation if self.deviation else math.nan


def auc_above(scores: Sequence[float], control: Sequence[float]) -> float:
    """Probability that one of ``scores`` is above one of ``control``, ties counted half."""
    above, below = (torch.tensor(values, dtype=torch.float64) for values in (scores, control))
    return membership_auc(-above, -below)
