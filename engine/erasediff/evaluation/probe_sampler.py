"""DDIM sampler of any process, with what probes of erased models change in it: noise, hand-over, start, mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from erasediff.diffusion.noise_schedule import Process

Predict = Callable[[int, Tensor, int], Tensor]
"""Function of the sampler's step, x_t [B, ...] and the train timestep t that returns the prediction [B, ...]."""
Draw = Callable[[int], Tensor]
"""Function of the sampler's step that returns standard normal noise [B, ...]."""


@dataclass(frozen=True, slots=True)
class ExtraNoise:
    """Noise that is added at every step (arXiv 2505.17013).

    x_s = alpha_s x_0 + sqrt(|sigma_s^2 - eta p^2|) eps + scale eta p n, with the posterior deviation p and n ~ N(0, 1):
    DDPM's step for eta = scale = 1, and a noisier one beyond.

    Attributes:
        eta: Factor of the noise.
        scale: Further factor of the drawn noise alone.
    """

    eta: float
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Known:
    """Part of an image that is given (blended latent diffusion, Avrahami et al. 2022).

    Attributes:
        sample: Clean image [B, ...] as the network takes it.
        mask: What is drawn, 1, and what is given, 0; broadcast against ``sample``.
        noise: Standard normal noise [B, ...] of the given part.
    """

    sample: Tensor
    mask: Tensor
    noise: Tensor


def spaced_timesteps(process: Process, steps: int) -> list[int]:
    """``steps`` train timesteps from the last one down, evenly spaced ("trailing", Lin et al. 2023)."""
    last = process.num_train_timesteps
    return [round(last - last * step / steps) - 1 for step in range(steps)]


def clean_and_noise(process: Process, sample: Tensor, prediction: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
    """(x_0, epsilon), both [B, ...], that a prediction at x_t = ``sample`` stands for."""
    alpha, sigma = process.alpha[timestep].to(sample), process.sigma[timestep].to(sample)
    match process.prediction_type:
        case "epsilon":
            return (sample - sigma * prediction) / alpha, prediction
        case "v_prediction":
            return alpha * sample - sigma * prediction, sigma * sample + alpha * prediction
        case "sample":
            return prediction, (sample - alpha * prediction) / sigma
        case _:
            clean = sample - sigma * prediction
            return clean, clean + prediction


@torch.no_grad()
def ddim(
    process: Process,
    sample: Tensor,
    timesteps: list[int],
    predict: Predict,
    *,
    first: int = 0,
    extra: ExtraNoise | None = None,
    draw: Draw | None = None,
    known: Known | None = None,
    bound: float | None = None,
) -> Tensor:
    """Sample from x at ``timesteps[first]`` to x_0 (Song et al. 2021, eq. 12), for flow matching Euler's steps.

    Args:
        process: Noise schedule and prediction type.
        sample: [B, ...] at the first timestep.
        timesteps: Descending, of the whole trajectory.
        predict: The network's prediction.
        first: Number of steps that are already taken.
        extra: Noise added at every step; needs ``draw``.
        draw: Noise of a step.
        known: Part of the image that is given.
        bound: Limit of |x_0| at every step; None for none.
    """
    for step in range(first, len(timesteps)):
        timestep = timesteps[step]
        clean, noise = clean_and_noise(process, sample, predict(step, sample, timestep), timestep)
        if bound is not None:
            clean = clean.clamp(-bound, bound)
        if step + 1 == len(timesteps):
            return clean if known is None else known.mask * clean + (1 - known.mask) * known.sample
        alpha, sigma = (table[timesteps[step + 1]].to(sample) for table in (process.alpha, process.sigma))
        sample = alpha * clean + sigma * noise
        if extra is not None:
            assert draw is not None, "extra noise needs draw"
            deviation = _posterior_deviation(process, timestep, timesteps[step + 1]).to(sample)
            kept = (sigma.square() - extra.eta * deviation.square()).abs().sqrt()
            sample = alpha * clean + kept * noise + extra.scale * extra.eta * deviation * draw(step)
        if known is not None:
            sample = known.mask * sample + (1 - known.mask) * (alpha * known.sample + sigma * known.noise)
    return sample


def _posterior_deviation(process: Process, timestep: int, following: int) -> Tensor:
    """Deviation of x_s given x_t and x_0, s < t; of DDPM where alpha^2 + sigma^2 = 1."""
    ratio = process.alpha[timestep] / process.alpha[following]
    between = (process.sigma[timestep].square() - (ratio * process.sigma[following]).square()).clamp(min=0)
    return process.sigma[following] / process.sigma[timestep] * between.sqrt()
