"""Features of images: activations in the middle of a frozen denoiser, of any family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Denoiser
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff_kernels import philox_noise

NOISE_LEVEL = 0.05
"""Timestep as a share of T: under little noise, activations tell most of an image."""
MOST_PLACES = 4
"""Height and width that maps of activations are averaged down to."""


class DenoiserFeatures:
    """Features of samples: activations of a frozen denoiser's middle block, averaged to at most 4 x 4 places.

    Xiang et al. 2023 (arXiv 2303.09769) fit classifiers to them. All samples get the same noise.

    Args:
        network: The denoiser, on the device that it runs on.
        process: Noise schedule and prediction type.
        denoiser: How the network is called.
        condition: Condition [1, ...] that all samples have, such as the empty caption's; {} for none.
        batch_size: Samples per call of the network.
        seed: Seed of the noise.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        denoiser: Denoiser,
        condition: Mapping[str, Tensor],
        *,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.network, self.denoiser = network, denoiser
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.process, self.condition = process.to(self.device), condition
        self.batch_size, self.seed = batch_size, seed

    @torch.no_grad()
    def of(self, sample: Tensor, progress: Callable[[int], None] | None = None) -> Tensor:
        """Features float32 [N, D] on the host, of samples [N, C, h, w]; ``progress`` counts samples."""
        was_training = self.network.training
        self.network.eval()
        found: list[Tensor] = []
        handle = middle_block(self.network).register_forward_hook(lambda _, __, output: found.append(_pooled(output)))
        try:
            for part in torch.split(sample, self.batch_size):
                self._call(part.to(self.device))
                if progress is not None:
                    progress(len(part))
        finally:
            handle.remove()
            self.network.train(was_training)
        return torch.cat(found)

    def _call(self, x: Tensor) -> None:
        timestep = int(NOISE_LEVEL * self.process.num_train_timesteps)
        timesteps = torch.full((len(x),), timestep, dtype=torch.int64, device=self.device)
        key = noise_key(self.seed, timestep, self.device)
        noise = philox_noise(torch.zeros_like(timesteps), key, int(NoiseRole.CLASSIFIER), tuple(x.shape[1:]))
        alpha, sigma = (value.view(-1, *(1,) * (x.ndim - 1)) for value in self.process.coefficients(timesteps))
        condition = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype).expand(
                len(x), *value.shape[1:]
            )
            for name, value in self.condition.items()
        }
        noisy_sample = (alpha * x + sigma * noise).to(self.dtype)
        self.denoiser(self.network, noisy_sample, self.process.conditioning[timesteps], condition)


def middle_block(network: nn.Module) -> nn.Module:
    """The middle block of a UNet, or the middle one of a transformer's blocks.

    Raises:
        ValueError: The network has neither.
    """
    block: Any = getattr(network, "mid_block", None)
    if block is not None:
        return nn.Module.get_submodule(network, "mid_block")
    blocks: Sequence[nn.Module] = [
        module
        for name, children in network.named_children()
        if name.endswith("transformer_blocks") and isinstance(children, nn.ModuleList)
        for module in children
    ]
    if not blocks:
        raise ValueError(f"{type(network).__name__} has neither a mid_block nor transformer_blocks")
    return blocks[len(blocks) // 2]


def _pooled(output: Any) -> Tensor:
    """Activations [B, C, h, w], or tokens [B, L, C] of which joint blocks return the text's too: float32 [B, D]."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[-1]
    if tensor.ndim == 3:
        side = round(tensor.shape[1] ** 0.5)
        if side * side != tensor.shape[1]:
            return tensor.mean(1).float().cpu()
        tensor = tensor.transpose(1, 2).reshape(len(tensor), -1, side, side)
    height, width = (min(side, MOST_PLACES) for side in tensor.shape[2:])
    return nn.functional.adaptive_avg_pool2d(tensor.float(), (height, width)).flatten(1).cpu()
