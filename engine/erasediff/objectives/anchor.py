"""Which condition a model explains images best by: what forgotten images resemble most among what is retained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from erasediff.objectives.batch import Batch, Denoiser, condition_of, diffusers_denoiser, with_sample_ids
from erasediff.process import NoiseRole, Process, noise_key
from erasediff_kernels import add_noise, denoising_loss


@torch.no_grad()
def condition_losses(
    model: nn.Module,
    batch: Batch,
    conditions: Mapping[str, Tensor],
    *,
    process: Process,
    denoiser: Denoiser = diffusers_denoiser,
    draws: int = 4,
    seed: int = 0,
) -> Tensor:
    """float32 [n]: the mean denoising loss of ``batch`` under each of n conditions in the place of its own.

    The least of them is the answer of a diffusion classifier (Li et al. 2023, arXiv 2303.16203, eq. 4-5). All
    conditions see the same noisy images, so that losses differ by the condition alone; timesteps are evenly spread.

    conditions: for each entry of the batch's condition that is replaced, a tensor [n, ...]
    draws:      timesteps and noises per image

    Raises ``ValueError`` for fewer than one draw, conditions of unequal lengths, and a batch as in ``with_sample_ids``.
    """
    lengths = {len(tensor) for tensor in conditions.values()}
    if draws < 1 or len(lengths) != 1:
        raise ValueError(f"needs at least one draw and conditions of one length, got {draws} draws and {lengths}")
    batch = with_sample_ids(batch)
    sample, ids = batch["sample"], batch["sample_ids"]
    process, own, role = process.to(sample.device), condition_of(batch), int(NoiseRole.ANCHOR)
    count, places = len(sample), torch.arange(len(sample), device=sample.device)
    weight = torch.full((count,), 1 / (count * draws), device=sample.device)
    totals = torch.zeros(lengths.pop(), device=sample.device)
    for draw in range(draws):
        key = noise_key(seed, draw, sample.device)
        timesteps = (places * draws + draw) * process.num_train_timesteps // (count * draws)
        alpha, sigma = process.coefficients(timesteps)
        noisy_sample = add_noise(sample, alpha, sigma, sample_ids=ids, key=key, role=role)
        for number in range(len(totals)):
            replaced = {
                name: tensor[number].to(sample.device).expand(count, *tensor.shape[1:])
                for name, tensor in conditions.items()
            }
            prediction = denoiser(model, noisy_sample, process.conditioning[timesteps], {**own, **replaced})
            totals[number] += denoising_loss(
                prediction.to(sample.dtype),
                sample,
                alpha,
                sigma,
                prediction_type=process.prediction_type,
                weight=weight,
                sample_ids=ids,
                key=key,
                role=role,
            ).loss
    return totals
