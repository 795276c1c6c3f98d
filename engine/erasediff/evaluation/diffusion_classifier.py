"""Diffusion classifier: under which of several conditions a model denoises an image best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Denoiser
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.diffusion.trajectories import clean_and_noise
from erasediff_kernels import philox_noise

EARLIEST = 0.3
"""Timesteps are spread over [EARLIEST T, T): under less noise, all conditions denoise an image alike."""
GOLDEN_RATIO = 0.6180339887498949
FIRST_DRAWS, KEPT = 2, 4
"""All conditions are compared in ``FIRST_DRAWS`` noises, the best ``KEPT`` of each image in the rest (section 3.3)."""


class DiffusionClassifier:
    """Classifier made of a frozen diffusion model (Li et al. 2023, arXiv 2303.16203, eq. 4-5, algorithm 1).

    The error of a condition is that of the noise which the model predicts under it, relative to its mean over the
    conditions at the same noisy image: no timestep outweighs another, and no prediction type matters. All conditions
    see the same noisy images.

    Args:
        network: The denoiser, on the device that it runs on.
        process: Noise schedule and prediction type.
        denoiser: How the network is called.
        draws: Timesteps and noises per image.
        batch_size: Samples per call of the network.
        seed: Seed of the noises, which are addressed by an image's index.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        denoiser: Denoiser,
        *,
        draws: int = 10,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.network, self.denoiser = network, denoiser
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.process = process.to(self.device)
        self.draws, self.batch_size, self.seed = draws, batch_size, seed

    def passes(self, count: int, conditions: int) -> int:
        """Number of samples that go through the network for ``count`` images and so many conditions."""
        first, rest = self._draws(conditions)
        return count * (len(first) * conditions + len(rest) * min(conditions, KEPT))

    @torch.no_grad()
    def classify(
        self, sample: Tensor, conditions: Mapping[str, Tensor], progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """Classify samples [N, C, h, w] by conditions, tensors [K, ...] by name: int64 [N] on the host.

        ``progress`` is called with a number of ``passes``.
        """
        count = len(next(iter(conditions.values())))
        was_training = self.network.training
        self.network.eval()
        first, rest = self._draws(count)
        every = torch.arange(count).expand(len(sample), count)
        errors = self._errors(sample, conditions, every, first, progress)
        if rest:
            kept = errors.argsort(dim=1, stable=True)[:, :KEPT]
            errors = errors.gather(1, kept) + self._errors(sample, conditions, kept, rest, progress)
            answers: Tensor = kept.gather(1, errors.argmin(1, keepdim=True))[:, 0]
        else:
            answers = errors.argmin(1)
        self.network.train(was_training)
        return answers

    def _draws(self, conditions: int) -> tuple[list[int], list[int]]:
        """Draws with all conditions, and draws with the best alone."""
        # Multiples of the golden ratio, so that the first ones are spread over time as all are.
        order = sorted(range(self.draws), key=lambda draw: draw * GOLDEN_RATIO % 1)
        return (order, []) if conditions <= KEPT else (order[:FIRST_DRAWS], order[FIRST_DRAWS:])

    def _errors(
        self,
        sample: Tensor,
        conditions: Mapping[str, Tensor],
        chosen: Tensor,
        draws: Sequence[int],
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        """Relative errors of the ``chosen`` conditions int64 [N, k], summed over ``draws``: float32 [N, k]."""
        rows = torch.arange(len(sample)).repeat_interleave(chosen.shape[1])
        flat = chosen.reshape(-1)
        total = torch.zeros(chosen.shape)
        for draw in draws:
            parts = []
            for at in torch.split(torch.arange(len(flat)), self.batch_size):
                condition = {name: tensor[flat[at]].to(self.device) for name, tensor in conditions.items()}
                parts.append(self._noise_errors(sample[rows[at]], rows[at], condition, draw).cpu())
                if progress is not None:
                    progress(len(at))
            errors = torch.cat(parts).reshape(chosen.shape)
            total += errors / errors.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return total

    def _noise_errors(self, sample: Tensor, ids: Tensor, condition: Mapping[str, Tensor], draw: int) -> Tensor:
        """Mean squared error float32 [B] of the predicted noise."""
        sample, ids, train_timesteps = sample.to(self.device), ids.to(self.device), self.process.num_train_timesteps
        timestep = int((EARLIEST + (1 - EARLIEST) * (draw + 0.5) / self.draws) * train_timesteps)
        timesteps = torch.full_like(ids, timestep)
        key = noise_key(self.seed, draw, self.device)
        noise = philox_noise(ids, key, int(NoiseRole.CLASSIFIER), tuple(sample.shape[1:]))
        alpha, sigma = (value.view(-1, *(1,) * (sample.ndim - 1)) for value in self.process.coefficients(timesteps))
        noisy_sample = alpha * sample + sigma * noise
        cast = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in condition.items()}
        prediction = self.denoiser(
            self.network, noisy_sample.to(self.dtype), self.process.conditioning[timesteps], cast
        )
        _, predicted = clean_and_noise(self.process, prediction.float(), noisy_sample, timesteps)
        return (predicted - noise).square().flatten(1).mean(1)
