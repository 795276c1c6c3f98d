"""Stable Diffusion 1.x and 2.x: a UNet that attends to the tokens of one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from erasediff.models.latent import LatentModel, model_dtype
from erasediff.objectives import Batch


class StableDiffusion(LatentModel):
    """Condition: ``encoder_hidden_states`` [B, 77, D]. 2.x differs in widths, text encoder and prediction type only."""

    family = "sd"
    denoiser_component = "unet"
    text_encoders: ClassVar = ("text_encoder",)
    pipeline_class = StableDiffusionPipeline
    flow = False
    usual_guidance = 7.5

    def _widths(self) -> Iterable[tuple[str, int, str, int]]:
        unet, vae, text = self.configs["unet"], self.configs["vae"], self.configs["text_encoder"]
        yield "the UNet's in_channels", unet.in_channels, "the VAE's latent_channels", vae.latent_channels
        yield (
            "the UNet's cross_attention_dim",
            unet.cross_attention_dim,
            "the text encoder's hidden_size",
            text.hidden_size,
        )

    def denoiser(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        dtype = model_dtype(model)
        text = condition["encoder_hidden_states"].to(dtype)
        prediction: Tensor = model(noisy_sample.to(dtype), timesteps, text, return_dict=False)[0]
        return prediction

    @property
    def original_layout(self) -> str:
        # OpenCLIP's text encoder, which came with 2.0, has the exact GELU, OpenAI's an approximation.
        return "sd2" if self.configs["text_encoder"].hidden_act == "gelu" else "sd1"

    @property
    def architecture(self) -> str:
        if self.original_layout == "sd1":
            return "stable-diffusion-v1"
        return f"stable-diffusion-v2-{'768-v' if self.process.prediction_type == 'v_prediction' else '512'}"

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text, _ = self._pipeline().encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": text}
