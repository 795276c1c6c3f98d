"""From a batch to L_r or L_f: noising, the model's prediction, and the loss, with every draw addressed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch, Denoiser, condition_of, diffusers_denoiser, micro_batches, with_sample_ids
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole, draw_timesteps
from erasediff.diffusion.targets import DeviationTarget
from erasediff.parallel.zero.engine import autocast
from erasediff_kernels import add_noise, denoising_loss, deviation_loss

Backward = Callable[[Tensor], None]

GIVEN = frozenset({"timesteps", "target"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisingObjective:
    """The losses of one model under one process.

    process:            schedule and prediction type
    denoiser:           how the model is called
    min_snr_gamma:      min-SNR weights in both losses; None weighs all timesteps alike
    antithetic:         timesteps in pairs t, T-1-t
    accumulation_steps: micro-batches per batch; the sum of their losses is the batch's mean
    autocast:           dtype of the forward passes (torch.bfloat16), or None
    rank:               of this process, for batches that do not bring sample ids
    """

    process: Process
    denoiser: Denoiser = diffusers_denoiser
    min_snr_gamma: float | None = None
    antithetic: bool = False
    accumulation_steps: int = 1
    autocast: torch.dtype | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        if self.accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {self.accumulation_steps}")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be positive, or None for no weighting, got {self.min_snr_gamma}")

    def retain_loss(self, model: nn.Module, batch: Batch, key: Tensor, backward: Backward | None) -> Tensor:
        """L_r = E |target(x_0, eps, t) - prediction(x_t)|^2, 0-D float32, detached (arXiv 2401.05779, L_r).

        ``backward`` is called on each micro-batch's share; None evaluates the loss alone.
        """
        roles = {"noise": NoiseRole.RETAIN_NOISE, "timestep": NoiseRole.RETAIN_TIMESTEP}
        return self.denoising_loss_of(model, batch, key, backward, **roles)

    def denoising_loss_of(
        self,
        model: nn.Module,
        batch: Batch,
        key: Tensor,
        backward: Backward | None,
        *,
        noise: NoiseRole,
        timestep: NoiseRole,
        sign: float = 1.0,
    ) -> Tensor:
        """The denoising loss against the true target; ``sign`` = -1 hands ``backward`` the loss to ascend on."""

        def loss(part: Batch, weight: Tensor) -> Tensor:
            noisy_sample, timesteps = self.noised(part, key, noise, timestep)
            alpha, sigma = self.process.coefficients(timesteps)
            prediction = self.prediction(model, noisy_sample, timesteps, condition_of(part))
            return denoising_loss(
                prediction.to(noisy_sample.dtype),
                part["sample"],
                alpha,
                sigma,
                prediction_type=self.process.prediction_type,
                weight=self._weighted(timesteps, sign * weight),
                sample_ids=part["sample_ids"],
                key=key,
                role=int(noise),
            ).loss

        return sign * self._accumulate(loss, batch, backward)

    def preservation_loss(
        self, model: nn.Module, teacher: nn.Module, batch: Batch, key: Tensor, backward: Backward | None
    ) -> Tensor:
        """E |teacher(x_t) - prediction(x_t)|^2 in the place of L_r, of the same x_t, 0-D float32, detached.

        What the model knew is kept rather than learned again from samples of it: where nothing is lost, the gradient is
        zero instead of the noise's, so nothing drifts (knowledge distillation, Hinton et al. 2015).
        """

        def loss(part: Batch, weight: Tensor) -> Tensor:
            noisy_sample, timesteps = self.noised(part, key, NoiseRole.RETAIN_NOISE, NoiseRole.RETAIN_TIMESTEP)
            condition = condition_of(part)
            with torch.no_grad():
                target = self.prediction(teacher, noisy_sample, timesteps, condition)
            prediction = self.prediction(model, noisy_sample, timesteps, condition)
            return deviation_loss(prediction, target=target, weight=self._weighted(timesteps, weight)).loss

        return self._accumulate(loss, batch, backward)

    def forget_loss(
        self, model: nn.Module, batch: Batch, key: Tensor, target: DeviationTarget, backward: Backward | None
    ) -> Tensor:
        """L_f = E |eps_f - prediction(x_t)|^2, x_t from the true noise, 0-D float32, detached (2401.05779, L_f)."""

        def loss(part: Batch, weight: Tensor) -> Tensor:
            noisy_sample, timesteps = self.noised(part, key, NoiseRole.FORGET_NOISE, NoiseRole.FORGET_TIMESTEP)
            conditioning = self.process.conditioning[timesteps]
            condition = condition_of(part)
            with autocast(model, noisy_sample.device, self.autocast):
                return target.loss(
                    self.denoiser(model, noisy_sample, conditioning, condition),
                    model=model,
                    denoiser=self.denoiser,
                    noisy_sample=noisy_sample,
                    timesteps=conditioning,
                    condition=condition,
                    sample_ids=part["sample_ids"],
                    key=key,
                    weight=self._weighted(timesteps, weight),
                )

        return self._accumulate(loss, batch, backward)

    def loss_to_target(self, model: nn.Module, batch: Batch, backward: Backward | None) -> Tensor:
        """E |target - prediction(x_t)|^2, 0-D float32, detached, of states that are given.

        The batch's ``"sample"`` is x_t; ``"timesteps"`` int64 [B] and ``"target"`` (like x_t) belong to it.
        """

        def loss(part: Batch, weight: Tensor) -> Tensor:
            timesteps = part["timesteps"]
            condition = {name: value for name, value in condition_of(part).items() if name not in GIVEN}
            prediction = self.prediction(model, part["sample"], timesteps, condition)
            weight = self._weighted(timesteps, weight)
            return deviation_loss(prediction.to(part["target"].dtype), target=part["target"], weight=weight).loss

        return self._accumulate(loss, batch, backward)

    def prediction(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        """What ``model`` predicts at x_t [B, ...] and train timesteps int64 [B]."""
        with autocast(model, noisy_sample.device, self.autocast):
            return self.denoiser(model, noisy_sample, self.process.conditioning[timesteps], condition)

    def micro_batch_count(self, batch: Batch) -> int:
        """How often ``backward`` will be called for ``batch``."""
        size = batch["sample"].shape[0] if "sample" in batch else 1
        return -(-size // -(-size // self.accumulation_steps)) if size else 1

    def noised(self, part: Batch, key: Tensor, noise: NoiseRole, timestep: NoiseRole) -> tuple[Tensor, Tensor]:
        """(x_t, timesteps) of a batch that brings its sample ids, both drawn in their role under ``key``."""
        ids = part["sample_ids"]
        timesteps = draw_timesteps(ids, key, timestep, self.process.num_train_timesteps, antithetic=self.antithetic)
        alpha, sigma = self.process.coefficients(timesteps)
        return add_noise(part["sample"], alpha, sigma, sample_ids=ids, key=key, role=int(noise)), timesteps

    def _weighted(self, timesteps: Tensor, weight: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return weight
        return weight * self.process.min_snr_weight(timesteps, self.min_snr_gamma)

    def _accumulate(self, loss: Callable[[Batch, Tensor], Tensor], batch: Batch, backward: Backward | None) -> Tensor:
        """Sum over micro-batches of ``loss(part, weight [B])``, the weights carrying the mean over the whole batch."""
        batch = with_sample_ids(batch, self.rank)
        sample = batch["sample"]
        weight = torch.full((sample.shape[0],), 1 / sample.shape[0], device=sample.device)
        total = torch.zeros((), device=sample.device)
        for part in micro_batches(batch, self.accumulation_steps):
            share = loss(part, weight[: part["sample"].shape[0]])
            if backward is not None:
                backward(share)
            total = total + share.detach()
        return total
