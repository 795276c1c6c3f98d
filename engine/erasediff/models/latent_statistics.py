"""Shift and scale of a VAE's latents, by which the denoiser's are normalised."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from erasediff.errors import UserError


def check_latent_statistics(owner: str, vae: Mapping[str, Any]) -> None:
    """Raise UserError for the configuration of the VAE ``owner`` by which its latents would not be finite numbers."""
    for name in ("scaling_factor", "shift_factor"):
        value = vae.get(name)
        if value is not None and not (_is_number(value) and (value > 0 or name == "shift_factor")):
            raise UserError(f"The configuration of {owner} is damaged: its {name} is {value!r}, not a number above 0.")
    for name in ("latents_mean", "latents_std"):
        values = vae.get(name)
        if values is not None and not (isinstance(values, list | tuple) and values and all(map(_is_number, values))):
            raise UserError(f"The configuration of {owner} is damaged: its {name} is no list of numbers.")
        if values is not None and name == "latents_std" and min(values) <= 0:
            raise UserError(f"The configuration of {owner} is damaged: its {name} holds a number that is not above 0.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
