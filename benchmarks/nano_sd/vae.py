"""The autoencoder: an image of 3 x 32 x 32 as a latent of 4 x 8 x 8, as Stable Diffusion's but without its critics."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from fashion import SIZE, Clothes
from pixels import as_rgb
from rich.console import Console
from torch.nn.functional import mse_loss

from erasediff.utils.progress import progress_bar

CHANNELS = (16, 32, 64)
KL_WEIGHT = 1e-4
SCALING_BATCH = 1000


def train_vae(
    clothes: Clothes, steps: int, seed: int, console: Console, device: torch.device | str = "cpu"
) -> tuple[AutoencoderKL, float]:
    """An AutoencoderKL with its latents' scale in ``scaling_factor``, and the mean squared error of the last steps.

    The loss is the squared error plus ``KL_WEIGHT`` times the divergence of a latent's element from N(0, 1), which
    keeps latents smooth enough for a small denoiser (Rombach et al. 2022, section 3.1).
    """
    torch.manual_seed(seed)
    levels = len(CHANNELS)
    vae = AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    ).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    error = 0.0
    with progress_bar(console, "Autoencoder", steps) as bar:
        for step in range(steps):
            pixels = as_rgb(clothes.images[torch.randint(len(clothes), (64,))].to(device))
            posterior = vae.encode(pixels).latent_dist
            distance = mse_loss(vae.decode(posterior.sample()).sample, pixels)
            loss = distance + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            error += (distance.item() - error) / min(step + 1, 20)
            bar.advance()
            bar.note(f"squared error {error:.4f}")
    vae.cpu()
    with torch.no_grad():
        latents = vae.encode(as_rgb(clothes.images[:SCALING_BATCH])).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae.to(memory_format=torch.contiguous_format), error
