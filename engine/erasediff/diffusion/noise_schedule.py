"""Noise schedules: x_t = alpha_t x_0 + sigma_t eps, for every parametrisation that diffusers knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True, slots=True)
class Process:
    """A forward process and what the model predicts about it.

    alpha:           [T] float32, the signal's coefficient at each train timestep
    sigma:           [T] float32, the noise's coefficient
    prediction_type: one of ``PREDICTION_TYPES``, spelled as in diffusers
    conditioning:    [T] float32 or int64, what the model is told about each timestep

    Source: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4); x_t = (1 - sigma) x_0 + sigma eps
    (flow matching, Lipman et al. 2022).
    """

    alpha: Tensor
    sigma: Tensor
    prediction_type: str
    conditioning: Tensor

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {self.prediction_type!r}")
        if self.alpha.ndim != 1 or self.alpha.shape != self.sigma.shape or self.alpha.shape != self.conditioning.shape:
            raise ValueError(
                "alpha, sigma and conditioning must be vectors of one length, got "
                f"{tuple(self.alpha.shape)}, {tuple(self.sigma.shape)}, {tuple(self.conditioning.shape)}"
            )

    @property
    def num_train_timesteps(self) -> int:
        return self.alpha.numel()

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Process:
        """The process that a diffusers scheduler was configured for.

        Takes any scheduler with ``alphas_cumprod`` (DDPM, DDIM, DPM-Solver, ...) or a flow-matching one with
        ``sigmas`` over its train timesteps. Raises ``ValueError`` for one with neither.
        """
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is not None:
            alphas_cumprod = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
            timesteps = torch.arange(alphas_cumprod.numel())
            prediction_type = getattr(scheduler.config, "prediction_type", "epsilon")
            return cls(alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float(), prediction_type, timesteps)
        if "FlowMatch" in type(scheduler).__name__:
            num_train_timesteps = scheduler.config.num_train_timesteps
            sigma = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
            # With dynamic shifting the sampler shifts by image size; training is on the unshifted schedule.
            dynamic = getattr(scheduler.config, "use_dynamic_shifting", False)
            shift = 1.0 if dynamic else float(getattr(scheduler.config, "shift", 1.0))
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            return cls((1 - sigma).float(), sigma.float(), "flow_prediction", (sigma * num_train_timesteps).float())
        raise ValueError(
            f"{type(scheduler).__name__} has neither alphas_cumprod nor flow-matching sigmas; give a DDPM-like or a "
            "FlowMatch scheduler"
        )

    def to(self, device: torch.device | str) -> Process:
        """The same process with its tables on ``device``."""
        return Process(self.alpha.to(device), self.sigma.to(device), self.prediction_type, self.conditioning.to(device))

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each [B] float32, at int64 ``timesteps`` [B]."""
        return self.alpha[timesteps], self.sigma[timesteps]

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """[B] float32: the weight that bounds each timestep's loss as if predicting x_0 with weight min(SNR, gamma).

        epsilon: min(SNR, gamma) / SNR, v_prediction: min(SNR, gamma) / (SNR + 1), sample: min(SNR, gamma)
        (Hang et al. 2023, "Min-SNR weighting", section 3.4). flow_prediction: the error of eps - x_0 at a given x_t is
        that of x_0 divided by sigma, so the weight is min(SNR, gamma) sigma^2.
        """
        alpha, sigma = self.coefficients(timesteps)
        # min(SNR, gamma) with the division cleared, so that sigma = 0 and alpha = 0 stay finite.
        match self.prediction_type:
            case "epsilon":
                return torch.where(
                    alpha.square() <= gamma * sigma.square(), torch.ones_like(alpha), gamma * (sigma / alpha).square()
                )
            case "v_prediction":
                return torch.minimum(alpha.square(), gamma * sigma.square()) / (alpha.square() + sigma.square())
            case "sample":
                return (alpha / sigma).square().clamp(max=gamma)
            case _:
                return torch.minimum(alpha.square(), gamma * sigma.square())
