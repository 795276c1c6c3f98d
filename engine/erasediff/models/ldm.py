"""LDM: unconditional diffusion in the latents of a vector-quantised autoencoder (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from diffusers import LDMPipeline, UNet2DModel
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.errors import UserError
from erasediff.models import unet2d
from erasediff.models.checkpoint_model import model_dtype
from erasediff.models.diffusion_model import Condition, mean_prediction
from erasediff.models.unprompted_latents import UnpromptedLatentModel


class _Point(NamedTuple):
    """A distribution of latents that is certain of them."""

    mean: Tensor
    std: Tensor


class LatentDiffusion(UnpromptedLatentModel):
    """UNet2DModel on the latents of a VQModel, unconditional.

    The denoiser is trained on latents before quantisation, times the autoencoder's ``scaling_factor``; decoding
    quantises them.
    """

    family = "ldm"
    denoiser_component = "unet"
    denoiser_class = UNet2DModel
    autoencoder_component = "vqvae"
    pipeline_class = LDMPipeline
    flow = False
    default_guidance = 1.0
    subsets = unet2d.SUBSETS

    @classmethod
    def has_denoiser(cls, class_name: str, config: Any) -> bool:
        # Alone, a UNet2DModel is taken for one of pixels.
        return False

    @classmethod
    def dummy_inputs(
        cls, config: Any, batch_size: int, latent_size: tuple[int, int], dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Any]:
        return unet2d.dummy_inputs(config, batch_size, latent_size, dtype, device)

    def _check_components(self) -> None:
        super()._check_components()
        unet2d.check_network(self.checkpoint.path, self._denoiser_config)
        if unet2d.is_class_conditional(self._denoiser_config):
            raise UserError(
                f"The UNet in {self.checkpoint.path} takes class labels, which an LDMPipeline does not give it: give "
                "an unconditional one."
            )

    def _widths(self) -> Iterable[tuple[str, int, str, int]]:
        unet, autoencoder = self.configs["unet"], self.configs["vqvae"]
        latents = autoencoder.get("vq_embed_dim") or autoencoder.latent_channels
        yield "the UNet's in_channels", unet.in_channels, "the width of the autoencoder's codes", latents

    @property
    def condition(self) -> Condition:
        return "none"

    def _posterior(self, pixels: Tensor) -> _Point:
        autoencoder: Any = self.encoders["vqvae"]
        latents = autoencoder.encode(pixels).latents
        return _Point(latents, torch.zeros_like(latents))

    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        prediction = model(noisy_sample.to(model_dtype(model)), timesteps, return_dict=False)[0]
        return mean_prediction(prediction, noisy_sample)

    def described_by(self, class_names: tuple[str, ...]) -> Self:
        """This model: it has no classes, whatever the data have."""
        return self
