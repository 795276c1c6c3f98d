"""Losses of one micro-batch: denoising, preservation and forgetting, with noise and timesteps drawn by address.

Each loss takes a micro-batch of b samples and its weight [b], which carries 1 / B for a batch of B, and returns a 0-D
float32 that is differentiable in the model's weights: the micro-batches' losses sum to the batch's mean loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch, Denoiser, condition_of, diffusers_denoiser
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole, draw_timesteps
from erasediff.diffusion.targets import DeviationTarget, LossContext
from erasediff_kernels import add_noise, denoising_loss, deviation_loss

MicroBatchLoss = Callable[[Batch, Tensor], Tensor]
"""(micro-batch, weight [b]) to its loss, 0-D float32."""

GIVEN = frozenset({"timesteps", "target"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisingObjective:
    """The losses of one model under one process.

    Attributes:
        process: noise schedule and prediction type.
        denoiser: the call of the model.
        min_snr_gamma: gamma of min-SNR weights in all losses; None weighs all timesteps alike.
        antithetic: draw timesteps in pairs t, T-1-t.
        autocast: a context for each forward pass, such as that of mixed precision.

    Raises:
        ValueError: for a gamma that is not positive.
    """

    process: Process
    denoiser: Denoiser = diffusers_denoiser
    min_snr_gamma: float | None = None
    antithetic: bool = False
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    def __post_init__(self) -> None:
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be positive, or None for no weighting, got {self.min_snr_gamma}")

    def retain_loss(self, model: nn.Module, part: Batch, weight: Tensor, *, key: Tensor) -> Tensor:
        """L_r = E |target(x_0, eps, t) - prediction(x_t)|^2 (arXiv 2401.05779, L_r)."""
        roles = {"noise": NoiseRole.RETAIN_NOISE, "timestep": NoiseRole.RETAIN_TIMESTEP}
        return self.denoising_loss(model, part, weight, key=key, **roles)

    def denoising_loss(
        self, model: nn.Module, part: Batch, weight: Tensor, *, key: Tensor, noise: NoiseRole, timestep: NoiseRole
    ) -> Tensor:
        """The loss that the model was trained with, noise and timesteps drawn in the roles given.

        Args:
            model: predicts at x_t.
            part: a micro-batch with sample ids; ``"sample"`` is x_0 [b, ...].
            weight: [b]; a negative one makes the loss one to ascend on.
            key: int64 [2] of ``noise_key``.
            noise: the role that eps is drawn in.
            timestep: the role that t is drawn in.
        """
        timesteps = self._drawn_timesteps(part, key, timestep)
        return self.denoising_loss_at(model, part, weight, timesteps, key=key, noise=noise)

    def denoising_loss_at(
        self, model: nn.Module, part: Batch, weight: Tensor, timesteps: Tensor, *, key: Tensor, noise: NoiseRole
    ) -> Tensor:
        """``denoising_loss`` at train ``timesteps`` int64 [b] that are given."""
        alpha, sigma = self.process.coefficients(timesteps)
        noisy_sample = add_noise(part["sample"], alpha, sigma, sample_ids=part["sample_ids"], key=key, role=int(noise))
        prediction = self.prediction(model, noisy_sample, timesteps, condition_of(part))
        return denoising_loss(
            prediction.to(noisy_sample.dtype),
            part["sample"],
            alpha,
            sigma,
            prediction_type=self.process.prediction_type,
            weight=self._min_snr(self.process, timesteps, weight),
            sample_ids=part["sample_ids"],
            key=key,
            role=int(noise),
        ).loss

    def preservation_loss(
        self, model: nn.Module, teacher: nn.Module, part: Batch, weight: Tensor, *, key: Tensor
    ) -> Tensor:
        """E |teacher(x_t) - prediction(x_t)|^2 at the states x_t of L_r (knowledge distillation, Hinton et al. 2015).

        What the model knew is kept rather than learned again from samples of it: where nothing is lost, the gradient is
        zero instead of the noise's, so nothing drifts.
        """
        noisy_sample, timesteps = self.noised(part, key, NoiseRole.RETAIN_NOISE, NoiseRole.RETAIN_TIMESTEP)
        condition = condition_of(part)
        with torch.no_grad():
            target = self.prediction(teacher, noisy_sample, timesteps, condition)
        prediction = self.prediction(model, noisy_sample, timesteps, condition)
        return deviation_loss(prediction, target=target, weight=self._min_snr(self.process, timesteps, weight)).loss

    def forget_loss(
        self, model: nn.Module, target: DeviationTarget, part: Batch, weight: Tensor, *, key: Tensor
    ) -> Tensor:
        """L_f = E |eps_f - prediction(x_t)|^2, x_t from the true noise (arXiv 2401.05779, L_f)."""
        noisy_sample, timesteps = self.noised(part, key, NoiseRole.FORGET_NOISE, NoiseRole.FORGET_TIMESTEP)
        condition = condition_of(part)
        with self.autocast():
            prediction = self.denoiser(model, noisy_sample, self.process.conditioning[timesteps], condition)
            context = LossContext(
                model=model,
                denoiser=self.denoiser,
                process=self.process,
                noisy_sample=noisy_sample,
                timesteps=timesteps,
                condition=condition,
                sample_ids=part["sample_ids"],
                key=key,
                weight=self._min_snr(self.process, timesteps, weight),
                noise_weight=self._min_snr(self._predicting_noise, timesteps, weight),
            )
            return target.loss(prediction, context)

    def loss_to_target(self, model: nn.Module, part: Batch, weight: Tensor) -> Tensor:
        """E |target - prediction(x_t)|^2 at states that are given.

        The micro-batch's ``"sample"`` is x_t; ``"timesteps"`` int64 [b] and ``"target"`` (like x_t) belong to it.
        """
        timesteps = part["timesteps"]
        condition = {name: value for name, value in condition_of(part).items() if name not in GIVEN}
        prediction = self.prediction(model, part["sample"], timesteps, condition)
        weight = self._min_snr(self.process, timesteps, weight)
        return deviation_loss(prediction.to(part["target"].dtype), target=part["target"], weight=weight).loss

    def prediction(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        """The prediction of ``model``, [B, ...], at x_t [B, ...] and train timesteps int64 [B]."""
        with self.autocast():
            return self.denoiser(model, noisy_sample, self.process.conditioning[timesteps], condition)

    def noised(self, part: Batch, key: Tensor, noise: NoiseRole, timestep: NoiseRole) -> tuple[Tensor, Tensor]:
        """(x_t, timesteps) of a batch with sample ids, both drawn in their role under ``key``."""
        timesteps = self._drawn_timesteps(part, key, timestep)
        alpha, sigma = self.process.coefficients(timesteps)
        sample = add_noise(part["sample"], alpha, sigma, sample_ids=part["sample_ids"], key=key, role=int(noise))
        return sample, timesteps

    def _drawn_timesteps(self, part: Batch, key: Tensor, role: NoiseRole) -> Tensor:
        count = self.process.num_train_timesteps
        return draw_timesteps(part["sample_ids"], key, role, count, antithetic=self.antithetic)

    @property
    def _predicting_noise(self) -> Process:
        return dataclasses.replace(self.process, prediction_type="epsilon")

    def _min_snr(self, process: Process, timesteps: Tensor, weight: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return weight
        return weight * process.min_snr_weight(timesteps, self.min_snr_gamma)
