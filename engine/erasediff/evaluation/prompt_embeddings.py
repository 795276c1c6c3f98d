"""Search of prompt embeddings that reproduce one image (DoRI, arXiv 2507.16880)."""

from __future__ import annotations

import torch
from torch import Tensor

from erasediff.diffusion.batch import micro_batches
from erasediff.diffusion.losses import DenoisingObjective
from erasediff.diffusion.rng import noise_key
from erasediff.evaluation.attacks import for_latents
from erasediff.models.base import LatentModel


def embedding_search(
    model: LatentModel,
    latent: Tensor,
    prompt: str,
    *,
    steps: int = 50,
    lr: float = 0.1,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Adversarial embeddings of a prompt, under which one image is denoised (Kowalczuk et al. 2026, "Finding DoRI").

    Each step draws timesteps and noise anew for ``batch_size`` copies of the image. A removal that only suppresses a
    prompt leaves embeddings nearby that still reproduce its image. No weight changes.

    Args:
        model: The attacked model; its denoiser is frozen and set to evaluation mode.
        latent: [1, C, h, w] of the image.
        prompt: Its caption, where the search starts.
        steps: Steps of Adam.
        lr: Learning rate.
        batch_size: Copies of the image in a step.
        seed: Seed of the noise.

    Returns:
        Condition of the prompt, tensors [1, ...] as of ``encode_prompts``.
    """
    network = model.denoiser.requires_grad_(False).eval()
    objective = DenoisingObjective(process=model.process.to(model.device), denoiser=model.predict)
    start = model.encode_prompts([prompt])
    searched = {name: value.detach().float().clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(list(searched.values()), lr)
    copies = latent.expand(batch_size, *latent.shape[1:])
    slots = torch.arange(batch_size, device=model.device)
    for step in range(steps):
        optimizer.zero_grad()
        batch = {"sample": copies, "sample_ids": slots, **for_latents(model, searched, copies)}
        [(micro_batch, weight)] = micro_batches(batch)
        key = noise_key(seed, step, model.device)
        torch.autograd.backward(objective.retain_loss(network, micro_batch, weight, key=key))
        optimizer.step()
    return {name: value.detach().to(start[name].dtype) for name, value in searched.items()}
