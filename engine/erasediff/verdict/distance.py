"""Distance that predictions have moved, in units of that from the forgotten condition to its anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.judges.original import AnyDenoising
from erasediff_kernels import philox_noise

DRAWS = 4


@torch.no_grad()
def noise_predictions(
    model: AnyDenoising, network: nn.Module, sample: Tensor, candidate: Candidate, *, seed: int, batch_size: int = 16
) -> Tensor:
    """Predictions [DRAWS, N, ...] float32 on the host, of ``sample`` [N, ...] under one condition, at evenly spread
    timesteps; the noise is addressed by (``seed``, draw, index).
    """
    device, dtype = model.device, next(network.parameters()).dtype
    process = model.process.to(device)
    network.eval()
    drawn = []
    for draw in range(DRAWS):
        key, parts = noise_key(seed, draw, device), []
        for ids in torch.split(torch.arange(len(sample), device=device), batch_size):
            x = sample.to(device)[ids]
            timesteps = torch.full_like(ids, int((draw + 0.5) / DRAWS * process.num_train_timesteps))
            alpha, sigma = (value.view(-1, *(1,) * (x.ndim - 1)) for value in process.coefficients(timesteps))
            noise = philox_noise(ids, key, int(NoiseRole.DISTANCE), tuple(x.shape[1:]))
            condition = expanded(candidate.condition, len(ids), device, dtype)
            noisy_sample = (alpha * x + sigma * noise).to(dtype)
            parts.append(model.predict(network, noisy_sample, process.conditioning[timesteps], condition).float().cpu())
        drawn.append(torch.cat(parts))
    return torch.stack(drawn)


def expanded(
    condition: Mapping[str, Tensor], count: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The condition of one candidate for ``count`` samples."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype).expand(count, *value.shape[1:])
        for name, value in condition.items()
    }


def relative_distances(moved: Tensor, original: Tensor, unit: Tensor) -> Sequence[float]:
    """Root mean square distance of each sample, [DRAWS, N, ...] each, over that of ``unit`` from ``original``."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).flatten(2).square().mean((0, 2)).sqrt()

    scale = distance(unit, original).mean().clamp_min(torch.finfo(torch.float32).tiny)
    return [float(value) for value in distance(moved, original) / scale]
