"""Shift and scale of a VAE's latents, by which the denoiser's are normalised."""

from collections.abc import Mapping
from typing import Any

import torch


def latent_statistics(vae: Mapping[str, Any], device: torch.device) -> tuple[Any, Any]:
    """Read the statistics of latents from a VAE's configuration.

    Args:
        vae: Configuration of diffusers' AutoencoderKL.
        device: Device of the statistics.

    Returns:
        (shift, scale) of latents: numbers, or [C, 1, 1] where the VAE records channels' ``latents_mean`` and std.
    """
    factor = vae.get("scaling_factor", 1.0)
    if vae.get("latents_mean") is None or vae.get("latents_std") is None:
        return vae.get("shift_factor") or 0.0, factor
    mean, std = (torch.tensor(vae[name], device=device)[:, None, None] for name in ("latents_mean", "latents_std"))
    return mean, factor / std
