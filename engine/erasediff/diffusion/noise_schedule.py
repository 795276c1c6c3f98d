"""Noise schedules: x_t = alpha_t x_0 + sigma_t eps, for every parametrisation that diffusers knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erasediff.errors import UserError
from erasediff_kernels.ops.denoising_loss import PREDICTION_TYPES


@dataclass(frozen=True, slots=True)
class Process:
    """A forward process and what the model predicts about it.

    Source: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4); x_t = (1 - sigma) x_0 + sigma eps
    (flow matching, Lipman et al. 2022).

    Attributes:
        alpha: [T] float32, the signal's coefficient at each train timestep.
        sigma: [T] float32, the noise's coefficient.
        prediction_type: One of ``PREDICTION_TYPES``, spelled as in diffusers.
        conditioning: [T] float32 or int64, what the model is told about each timestep.

    Raises:
        ValueError: The prediction type is unknown, or the tables are not vectors of one length.
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

    def check_inference_steps(self, steps: int) -> None:
        """Raise UserError for a sampler of more steps than there are timesteps."""
        if steps > self.num_train_timesteps:
            raise UserError(
                f"A sampler of {steps:,} steps takes more than the {self.num_train_timesteps:,} timesteps of the "
                "model: choose fewer (num_inference_steps)."
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Process:
        """The process that a diffusers scheduler was configured for.

        A scheduler is a flow-matching one if its configuration says so (``prediction_type`` "flow_prediction" or
        ``use_flow_sigmas``), or if it has no ``alphas_cumprod`` and its own sigmas are those of flow matching. Training
        is on the schedule that the configuration shifts by a constant (``shift`` or ``flow_shift``); with dynamic
        shifting, where only the sampler shifts, by image size, it is on the unshifted one.

        Args:
            scheduler: Any scheduler of diffusers with ``alphas_cumprod`` (DDPM, DDIM, DPM-Solver, ...) or of flow
                matching (FlowMatchEuler, UniPC and DPM-Solver with ``use_flow_sigmas``, ...).

        Raises:
            ValueError: The scheduler has no such noise schedule, or its configuration contradicts itself.
        """
        if is_flow_matching(scheduler):
            sigma = _flow_sigmas(scheduler.config.num_train_timesteps, _training_shift(scheduler))
            conditioning = sigma * scheduler.config.num_train_timesteps
            return cls((1 - sigma).float(), sigma.float(), "flow_prediction", conditioning.float())
        alphas_cumprod = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64, device="cpu")
        timesteps = torch.arange(alphas_cumprod.numel())
        prediction_type = getattr(scheduler.config, "prediction_type", "epsilon")
        return cls(alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float(), prediction_type, timesteps)

    def to(self, device: torch.device | str) -> Process:
        """The same process with its tables on ``device``."""
        return Process(self.alpha.to(device), self.sigma.to(device), self.prediction_type, self.conditioning.to(device))

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each [B] float32, at int64 ``timesteps`` [B]."""
        return self.alpha[timesteps], self.sigma[timesteps]

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR loss weights: each timestep's loss is bounded as if x_0 were predicted with weight min(SNR, gamma).

        epsilon: min(SNR, gamma) / SNR, v_prediction: min(SNR, gamma) / (SNR + 1), sample: min(SNR, gamma)
        (Hang et al. 2023, "Min-SNR weighting", section 3.4). flow_prediction: the error of eps - x_0 at a given x_t is
        that of x_0 divided by sigma, so the weight is min(SNR, gamma) sigma^2.

        Args:
            timesteps: [B] int64, indices into the tables.
            gamma: The bound on the signal-to-noise ratio.

        Returns:
            [B] float32.
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


def is_flow_matching(scheduler: Any) -> bool:
    """Whether a diffusers scheduler samples by flow matching; if not, it has ``alphas_cumprod``.

    Raises:
        ValueError: The scheduler has neither noise schedule, or its configuration contradicts itself.
    """
    name = type(scheduler).__name__
    has_table = getattr(scheduler, "alphas_cumprod", None) is not None
    config = getattr(scheduler, "config", {})
    prediction_type, flow_sigmas = config.get("prediction_type"), config.get("use_flow_sigmas")
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} runs its sigmas from data to noise (invert_sigmas): give one that does not")
    if prediction_type == "flow_prediction" or flow_sigmas:
        if prediction_type != "flow_prediction" or not flow_sigmas:
            raise ValueError(
                f"{name} contradicts itself: its prediction_type is {prediction_type!r}, its use_flow_sigmas is "
                f"{flow_sigmas}; flow matching takes 'flow_prediction' and True, any other prediction False"
            )
        if has_table or _has_flow_sigmas(scheduler):
            return True
    elif has_table:
        return False
    elif _has_flow_sigmas(scheduler):
        return True
    raise ValueError(
        f"{name} has neither alphas_cumprod nor flow-matching sigmas; give a DDPM-like or a FlowMatch scheduler"
    )


def _has_flow_sigmas(scheduler: Any) -> bool:
    """Whether a new scheduler of this configuration begins with flow matching's sigma and time for each timestep."""
    config = getattr(scheduler, "config", {})
    if "shift" not in config or "num_train_timesteps" not in config:
        return False
    fresh = type(scheduler).from_config(config)
    shift = 1.0 if config.get("use_dynamic_shifting") else float(config["shift"])
    expected = _flow_sigmas(config["num_train_timesteps"], shift).flip(0)
    return all(
        isinstance(table, Tensor) and table.shape == expected.shape and torch.allclose(table.double(), expected, 1e-5)
        for table in (fresh.sigmas, fresh.timesteps / config["num_train_timesteps"])
    )


def _training_shift(scheduler: Any) -> float:
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        return 1.0
    if isinstance(getattr(type(scheduler), "shift", None), property):
        return float(scheduler.shift)  # what ``set_shift`` was given
    return float(config["shift"] if "shift" in config else config["flow_shift"])


def _flow_sigmas(num_train_timesteps: int, shift: float) -> Tensor:
    """[T] float64: shift t / (1 + (shift - 1) t) for t = 1/T, ..., 1 (Esser et al. 2024, eq. 23)."""
    time = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    return shift * time / (1 + (shift - 1) * time)
